"""What does another run do to a root? A program that obeys one command a line.

`python -m tests.unit.commit.run ROOT`
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from shardpoint.commit import RootOwner, acquire_root, ownership
from shardpoint.errors import CheckpointError
from shardpoint.storage import LocalStore
from tests.crash import tiny


class Run:
    """The program, started, as the test sees it."""

    def __init__(self, root: Path, repo_root: Path) -> None:
        command = [sys.executable, "-m", "tests.unit.commit.run", str(root)]
        self.process = subprocess.Popen(
            command, cwd=repo_root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.answer() == "ready"

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline() or '"gone"')

    def ask(self, *words: object) -> Any:
        self.tell(*words)
        return self.answer()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.close()

    def close(self) -> None:
        """End it; nothing happens where it has ended."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait()


class _Obeying:
    """The program itself."""

    def __init__(self, root: str) -> None:
        self.store = LocalStore(root)
        self.owner: RootOwner | None = None

    def acquire(self, kernel: str | None = None, watch_s: float = 0.0) -> None:
        if kernel is not None:
            setattr(ownership, "kernel_id", lambda: kernel)  # noqa: B010 - as if on another machine
        self.owner = acquire_root(self.store, listener=lambda _: None, watch_s=watch_s)

    def release(self) -> None:
        assert self.owner is not None
        self.owner.release()

    def save(self, name: str, fill: int) -> None:
        assert self.owner is not None
        tiny.save(self.store, self.owner, name, fill)


def main() -> None:
    obeying = _Obeying(sys.argv[1])

    def answer(value: object) -> None:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()

    answer("ready")
    for line in sys.stdin:
        verb, *words = json.loads(line)
        try:
            getattr(obeying, verb)(*words)
            answer("done")
        except CheckpointError as error:
            answer([type(error).__name__, str(error)])


if __name__ == "__main__":
    main()
