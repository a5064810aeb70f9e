"""What is left when a process that changes a root dies at its k-th change, and does the next run repair it?

Run as a program, so that it forks from a process without threads:
`python -m tests.crash.lives SCENARIO RENAMES DIRECTORY`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardpoint.catalog import verify
from shardpoint.commit import Attempt, acquire_root, committed_checkpoints, prune, publish_file
from shardpoint.container import layout_file
from shardpoint.storage import LocalStore, syscalls
from tests.crash import tiny

State = dict[str, int]


class Death:
    """Counts every call that changes the disk, and kills the process at one of them."""

    def __init__(self, at: int, renames: str) -> None:
        self.at = at
        self.count = 0
        for module, name in (
            *((os, name) for name in ("open", "rename", "replace", "mkdir", "unlink", "rmdir", "pwrite", "link")),
            (syscalls, "renameat2"),
            (syscalls, "fallocate"),
        ):
            self._wrap(module, name)
        if renames == "two":
            inner = syscalls.renameat2

            def refuse(source: str, target: str, flags: int) -> None:
                if flags == syscalls.RENAME_EXCHANGE:
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                inner(source, target, flags)

            syscalls.renameat2 = refuse

    def _wrap(self, module: Any, name: str) -> None:
        inner = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            if name != "open" or arguments[1] & os.O_CREAT:
                self.count += 1
                if self.count == self.at:
                    if name == "pwrite":  # torn: half of it
                        inner(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return inner(*arguments, **options)

        setattr(module, name, counted)


def in_child(work: Callable[[Callable[[str], None]], None]) -> tuple[bool, list[str]]:
    """Run work in a forked process; return whether it was killed, and what it told."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:

        def tell(text: str) -> None:
            os.write(write_end, f"{text}\n".encode())

        try:
            work(tell)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent reports it
            tell(f"error: {type(error).__name__}: {error}")
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        told = pipe.read().splitlines()
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status), told


@dataclass(frozen=True)
class Scenario:
    """What a root has, what a life does to it, and what it has then."""

    before: State
    after: State
    life: Callable[[Path], None]


def _owning(change: Callable[[LocalStore, Any], object]) -> Callable[[Path], None]:
    def life(root: Path) -> None:
        store = LocalStore(root)
        owner = acquire_root(store, listener=lambda _: None)
        change(store, owner)
        owner.release()

    return life


def _save_file(store: LocalStore, owner: Any) -> None:
    layout = layout_file([("w", "U8", (7,))])
    attempt = Attempt.open(store, owner, "weights.safetensors", files={"w": layout}, replace_file=True)
    writer = store.open_writer(f"{attempt.key}/w")
    writer.write_at(b"new-new", len(layout.header))
    writer.close()
    publish_file(attempt, "w")


def _save_linked(name: str, fill: int, source: str) -> Callable[[LocalStore, Any], object]:
    def change(store: LocalStore, owner: Any) -> None:
        attempt = tiny.save(store, owner, name, fill, source)
        if not attempt.linked:
            raise AssertionError(f"{name} does not share a file with {source}")

    return change


SCENARIOS = {
    "first": Scenario({}, {"a": 1}, _owning(lambda store, owner: tiny.save(store, owner, "a", 1))),
    "second": Scenario({"a": 1}, {"a": 1, "b": 2}, _owning(lambda store, owner: tiny.save(store, owner, "b", 2))),
    "replace": Scenario(
        {"a": 1, "b": 2}, {"a": 3, "b": 2}, _owning(lambda store, owner: tiny.save(store, owner, "a", 3))
    ),
    "linked": Scenario({"a": 1}, {"a": 1, "b": 1}, _owning(_save_linked("b", 1, "a"))),
    "replace_linked": Scenario({"a": 1, "b": 2}, {"a": 1, "b": 2}, _owning(_save_linked("b", 2, "b"))),
    "prune": Scenario({"a": 1, "b": 2}, {"b": 2}, _owning(lambda store, owner: prune(store, owner, "a"))),
    "file": Scenario({"a": 1}, {"a": 1}, _owning(_save_file)),
}


def make_root(root: Path, state: State) -> None:
    def work(_: Callable[[str], None]) -> None:
        store = LocalStore(root)
        owner = acquire_root(store, listener=lambda _: None)
        for name, fill in state.items():
            tiny.save(store, owner, name, fill)
        owner.release()

    _, told = in_child(work)
    if told:
        raise AssertionError(told)


def state_of(root: Path) -> State:
    """Return name -> fill of what a reader sees, each verified by the catalog and without the library."""
    store = LocalStore(root)
    found: State = {}
    for item in committed_checkpoints(store):
        report = verify(store, item)
        if not report.ok:
            raise AssertionError(f"{item.key} does not verify: {report.problems}")
        found[item.name] = tiny.fill_of(root / item.key)
    return found


def look_and_repair(root: Path, tell: Callable[[str], None]) -> None:
    """Look as a reader does; then be the next run; then look again, and save once more."""
    if root.exists():
        tell(json.dumps(state_of(root)))
    else:
        tell("{}")
    store = LocalStore(root)
    owner = acquire_root(store, listener=lambda _: None)
    tell(json.dumps(state_of(root)))
    (only,) = (root / ".shardpoint").iterdir()
    inside = sorted(path.name for path in only.iterdir())
    if inside != ["heartbeat", "lock", "owner.json"]:
        raise AssertionError(f"the new owner left {inside} in {only.name}")
    names = sorted(path.name for path in root.iterdir() if path.name not in (".shardpoint", "weights.safetensors"))
    if names != sorted(state_of(root)):
        raise AssertionError(f"the root has {names}")
    weights = root / "weights.safetensors"
    if weights.exists() and not weights.read_bytes().endswith(b"new-new"):
        raise AssertionError("a torn file is visible")
    tiny.save(store, owner, "next", 9)
    owner.release()


def judge(scenario: Scenario, told: list[str], returned: bool) -> list[str]:
    errors = [line for line in told if line.startswith("error")]
    if errors or len(told) != 2:
        return errors or [f"the repairing run died: {told}"]
    seen, repaired = (json.loads(line) for line in told)
    problems = []
    for what, state in (("a reader", seen), ("the next run", repaired)):
        if state not in (scenario.before, scenario.after):
            problems.append(f"{what} sees {state}")
    if (returned or seen == scenario.after) and repaired != scenario.after:
        problems.append(f"went back to {repaired}")
    if returned and seen != scenario.after:
        problems.append(f"the change had returned, a reader sees {seen}")
    return problems


def run_life(scenario: Scenario, root: Path, at: int, renames: str) -> tuple[bool, bool]:
    """Let a life die at its `at`-th change; return whether it died, and whether it had done its work."""

    def life(tell: Callable[[str], None]) -> None:
        Death(at, renames)
        scenario.life(root)
        tell("returned")

    killed, told = in_child(life)
    if any(line != "returned" for line in told):
        raise AssertionError(f"an undisturbed life failed at {at}: {told}")
    return killed, "returned" in told


def every_death(scenario: Scenario, renames: str, directory: Path) -> tuple[int, list[str]]:
    """Kill a life at every one of its changes; return how many there were, and what was wrong."""
    template, root = directory / "template", directory / "root"
    if scenario.before:
        make_root(template, scenario.before)
        state_of(template)  # forked processes then find every cache warm
    problems: list[str] = []
    at = 0
    while True:
        at += 1
        shutil.rmtree(root, ignore_errors=True)
        if scenario.before:
            shutil.copytree(template, root)
        killed, returned = run_life(scenario, root, at, renames)
        _, told = in_child(lambda tell: look_and_repair(root, tell))
        problems += [f"death at {at}: {problem}" for problem in judge(scenario, told, returned)]
        if not killed:
            return at - 1, problems


def every_second_death(renames: str, directory: Path) -> tuple[int, list[str]]:
    """Kill a replacing save at every change, then the run that repairs it at every change, then repair."""
    scenario = SCENARIOS["replace"]
    repairing = Scenario(scenario.before, scenario.after, _owning(lambda _store, _owner: None))
    template, root, torn = directory / "template", directory / "root", directory / "torn"
    make_root(template, scenario.before)
    state_of(template)
    problems: list[str] = []
    seen: set[tuple[str, ...]] = set()
    first = count = 0
    killed = True
    while killed:
        first += 1
        shutil.rmtree(torn, ignore_errors=True)
        shutil.copytree(template, torn)
        killed, returned = run_life(scenario, torn, first, renames)
        shape = _shape(torn)
        if shape in seen:
            continue
        seen.add(shape)
        second, again = 0, True
        while again:
            second += 1
            count += 1
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(torn, root)
            again, _ = run_life(repairing, root, second, renames)
            _, told = in_child(lambda tell: look_and_repair(root, tell))
            problems += [f"deaths at {first}, {second}: {text}" for text in judge(scenario, told, returned)]
    return count, problems


def _shape(root: Path) -> tuple[str, ...]:
    """Return what tells two torn roots apart: which kinds of things are where, not how far each of them got."""
    shape: set[str] = set()
    for path in root.rglob("*"):
        parts = [part.split("-")[0] for part in path.relative_to(root).parts]
        if path.name in ("shardpoint.json", "owner.json", "lock") or path.is_dir():
            shape.add("/".join(parts) + ("=whole" if path.name == "shardpoint.json" and _sealed(path) else ""))
    return tuple(sorted(shape))


def _sealed(path: Path) -> bool:
    return path.read_bytes().endswith(b'"\n}\n')


def main() -> None:
    name, renames, directory = sys.argv[1:]
    setattr(os, "fsync", lambda _: None)  # noqa: B010 - a killed process loses nothing that the kernel has
    if name == "repair":
        count, problems = every_second_death(renames, Path(directory))
    else:
        count, problems = every_death(SCENARIOS[name], renames, Path(directory))
    sys.stdout.write(json.dumps({"deaths": count, "problems": problems}))


if __name__ == "__main__":
    main()
