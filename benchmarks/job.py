"""How does the driver start ranks that are real processes, and have them do things together?

The driver writes one JSON request to each rank and reads one JSON reply from each (see `rank.py`). Between two requests
the ranks sleep in a read, so several jobs can stand by while one of them is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

REPO = Path(__file__).resolve().parents[1]
WORLD_SIZE = 2
_STOP_S = 60.0


class RankFailureError(Exception):
    """A rank raised, died or fell silent; the message says which, and how."""


class Job:
    """Ranks of one process group, waiting for requests.

    Args:
        python: the interpreter, which decides what is installed.
        log: what the ranks print goes to this path, with `.rank<n>.log` behind it.
        world_size: how many ranks.
        env: what to set besides in their environment.
    """

    def __init__(
        self, python: Path, log: Path, *, world_size: int = WORLD_SIZE, env: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        shared = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(REPO / "src"), str(REPO)]),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        shared |= dict(env or {})
        self._ranks = [_Rank(python, shared, rank, self._log_of(rank)) for rank in range(world_size)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: str, *, timeout_s: float = 900.0, **arguments: Any) -> list[Any]:
        """Have every rank call a function, and return what each returned.

        Args:
            function: "module:name" of a function whose first parameter is the `Rank`.
            timeout_s: seconds until a rank that has not answered counts as lost.
            **arguments: the function's other arguments, as JSON.

        Raises:
            RankFailureError: a rank raised, died or did not answer; the job is of no use any more.
        """
        line = json.dumps({"function": function, "arguments": arguments}) + "\n"
        for rank in self._ranks:
            rank.send(line)
        replies: dict[int, Any] = {}
        give_up_at = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for number, rank in enumerate(self._ranks):
                selector.register(rank.replies, selectors.EVENT_READ, number)
            while len(replies) < len(self._ranks):
                ready = selector.select(max(0.0, give_up_at - time.monotonic()))
                if not ready:
                    raise self._failure(f"no answer to {function} after {timeout_s:.0f} s")
                for key, _ in ready:
                    reply = self._ranks[key.data].replies.readline()
                    if not reply:
                        raise self._failure(f"rank {key.data} died in {function}", key.data)
                    document = json.loads(reply)
                    if "error" in document:
                        raise self._failure(f"rank {key.data} in {function}: {document['error']}")
                    replies[key.data] = document["result"]
                    selector.unregister(key.fileobj)
        return [replies[number] for number in range(len(self._ranks))]

    def close(self) -> None:
        """End the ranks: ask them first, kill them when they do not go."""
        for rank in self._ranks:
            rank.hang_up()
        give_up_at = time.monotonic() + _STOP_S
        for rank in self._ranks:
            rank.end(give_up_at)

    def kill(self) -> None:
        """End the ranks at once."""
        for rank in self._ranks:
            rank.end(time.monotonic())

    def _log_of(self, rank: int) -> Path:
        return self._log.with_name(f"{self._log.name}.rank{rank}.log")

    def _failure(self, text: str, rank: int | None = None) -> RankFailureError:
        self.kill()
        if rank is not None:
            text += ": " + self._log_of(rank).read_text(encoding="utf-8", errors="replace")[-2000:]
        return RankFailureError(text)


class _Rank:
    """One process, with a pipe each way."""

    def __init__(self, python: Path, env: Mapping[str, str], rank: int, log: Path) -> None:
        request_end, to_rank = os.pipe()
        from_rank, reply_end = os.pipe()
        env = dict(env) | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "BENCHMARK_PIPES": f"{request_end},{reply_end}",
        }
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(python), "-m", "benchmarks.rank"],
                cwd=log.parent,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(request_end, reply_end),
                start_new_session=True,
            )
        os.close(request_end)
        os.close(reply_end)
        self._requests = os.fdopen(to_rank, "w", encoding="utf-8")
        self.replies: IO[str] = os.fdopen(from_rank, encoding="utf-8")

    def send(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # its death is seen where its reply is awaited
            self._requests.write(line)
            self._requests.flush()

    def hang_up(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()

    def end(self, give_up_at: float) -> None:
        try:
            self._process.wait(max(0.0, give_up_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.hang_up()
        self.replies.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
