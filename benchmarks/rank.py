"""What does one rank of a job do? It calls the functions that the driver names, until the driver hangs up.

A function is named "module:name"; it gets this rank's `Rank` and JSON arguments, and returns something that is JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from benchmarks.contenders import Contender
    from benchmarks.subject import Subject


@dataclass
class Rank:
    """What a rank remembers from one request to the next.

    Attributes:
        rank: this rank's number.
        world_size: how many ranks there are.
        contenders: the systems that are ready to be measured, by name.
        kept: whatever else a case keeps, by name.
    """

    rank: int
    world_size: int
    contenders: dict[str, Contender] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    _subject: Subject | None = None

    @property
    def subject(self) -> Subject:
        """The training state that is saved and loaded."""
        if self._subject is None:
            text = "nothing has been built yet"
            raise RuntimeError(text)
        return self._subject

    @subject.setter
    def subject(self, subject: Subject) -> None:
        self._subject = subject


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Wait for all ranks, do something, and return when it began and ended, on the clock that all ranks share."""
    gc.collect()
    dist.barrier()
    start = time.monotonic()
    action()
    return start, time.monotonic()


def main() -> None:
    """Answer requests until there are no more."""
    request_fd, reply_fd = map(int, os.environ["BENCHMARK_PIPES"].split(","))
    for descriptor in (request_fd, reply_fd):  # what a contender starts must not hold the pipes open
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - it takes no keyword
    torch.set_num_threads(1)
    me = Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    with os.fdopen(request_fd, encoding="utf-8") as requests, os.fdopen(reply_fd, "w", encoding="utf-8") as replies:
        for line in requests:
            reply: dict[str, Any]
            try:
                request = json.loads(line)
                module, name = request["function"].split(":")
                function = getattr(importlib.import_module(module), name)
                reply = {"result": function(me, **request["arguments"])}
            except BaseException as error:  # noqa: BLE001 - every failure is the driver's to judge
                traceback.print_exc()
                reply = {"error": "".join(traceback.format_exception_only(error)).strip()[:2000]}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
    for contender in me.contenders.values():
        contender.close()
    # Order: not through interpreter shutdown, where a process group's threads of some contenders can hang.
    os._exit(0)


if __name__ == "__main__":
    main()
