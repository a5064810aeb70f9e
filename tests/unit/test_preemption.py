"""Is a signal noted instead of obeyed, and is everything as before afterwards?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shardpoint.errors import UsageError
from shardpoint.preemption import SignalWatch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _handlers_are_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    yield
    now = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert now == before


def send(number: int) -> None:
    os.kill(os.getpid(), number)  # Python runs the handler before the next line


def test_the_first_signal_is_noted_and_nothing_dies() -> None:
    times = iter([10.0, 20.0])
    watch = SignalWatch(SIGNALS, lambda: next(times))
    watch.open()
    assert watch.first is None
    send(signal.SIGUSR1)
    send(signal.SIGTERM)
    assert watch.first == (signal.SIGUSR1, 10.0)
    assert next(times) == 20.0
    watch.close()
    watch.close()


def test_a_handler_that_was_there_is_called_too_and_put_back() -> None:
    heard: list[int] = []

    def mine(number: int, _: object) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGUSR1, mine)
    watch = SignalWatch(SIGNALS)
    watch.open()
    send(signal.SIGUSR1)
    assert watch.first is not None
    assert heard == [signal.SIGUSR1]
    watch.close()
    assert signal.getsignal(signal.SIGUSR1) == mine
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGUSR1, before)


def test_what_such_a_handler_raises_it_raises_but_the_signal_was_noted() -> None:
    def leave(*_: object) -> None:
        raise SystemExit(3)

    before = signal.signal(signal.SIGUSR1, leave)
    watch = SignalWatch(SIGNALS)
    watch.open()
    with pytest.raises(SystemExit):
        send(signal.SIGUSR1)
    assert watch.first is not None
    watch.close()
    signal.signal(signal.SIGUSR1, before)


def test_an_interrupt_from_the_keyboard_can_be_one_and_interrupts_nothing_then() -> None:
    # A shell starts what it puts into the background with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watch = SignalWatch([signal.SIGINT])
    watch.open()
    send(signal.SIGINT)
    assert watch.first is not None
    watch.close()
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_watches_close_in_any_order(order: tuple[int, int]) -> None:
    watches = [SignalWatch(SIGNALS), SignalWatch(SIGNALS)]
    for watch in watches:
        watch.open()
    send(signal.SIGUSR1)
    assert all(watch.first is not None for watch in watches)
    watches[order[0]].close()
    send(signal.SIGTERM)  # the other one is still there
    watches[order[1]].close()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_handler_that_was_installed_later_stays() -> None:
    def later(*_: object) -> None: ...

    watch = SignalWatch([signal.SIGUSR1])
    watch.open()
    signal.signal(signal.SIGUSR1, later)
    watch.close()
    assert signal.getsignal(signal.SIGUSR1) == later
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_handler_that_was_put_over_it_and_calls_it_does_not_go_round_in_circles() -> None:
    heard = []
    first, second = SignalWatch([signal.SIGUSR1]), SignalWatch([signal.SIGUSR1])
    first.open()
    under: Any = signal.getsignal(signal.SIGUSR1)

    def over(number: int, frame: Any) -> None:
        heard.append(number)
        under(number, frame)

    signal.signal(signal.SIGUSR1, over)
    second.open()
    send(signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]
    assert first.first is not None
    assert second.first is not None
    second.close()
    first.close()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def in_a_thread(work: Callable[[], None]) -> BaseException | None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_elsewhere_than_in_the_main_thread_it_says_so() -> None:
    error = in_a_thread(SignalWatch(SIGNALS).open)
    assert isinstance(error, UsageError)
    assert "main thread" in str(error)


def run(code: str) -> subprocess.CompletedProcess[str]:
    head = "import os, signal, sys, threading\nfrom shardpoint.preemption import SignalWatch\n"
    command = [sys.executable, "-W", "ignore", "-c", head + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_forked_child_dies_of_the_signal_as_it_would_have() -> None:
    done = run(
        "watch = SignalWatch([signal.SIGTERM])\n"
        "watch.open()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os._exit(0)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), watch.first)\n"
    )
    assert (done.stdout, done.stderr) == (f"{-signal.SIGTERM} None\n", "")


def test_a_forked_child_can_watch_for_itself() -> None:
    done = run(
        "watch = SignalWatch([signal.SIGTERM])\n"
        "watch.open()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    own = SignalWatch([signal.SIGTERM])\n"
        "    own.open()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os._exit(0 if own.first and not watch.first else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(watch.first is not None)\n"
    )
    assert (done.stdout, done.stderr) == ("0\nTrue\n", "")


def test_closed_by_another_thread_the_signal_does_what_it_would_have_done() -> None:
    done = run(
        "watch = SignalWatch([signal.SIGTERM])\n"
        "watch.open()\n"
        "thread = threading.Thread(target=watch.close)\n"
        "thread.start(); thread.join()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('alive')\n"
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


def test_a_handler_that_is_not_pythons_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGUSR1 else signal.SIG_DFL)
    with pytest.raises(UsageError, match="SIGUSR1 has a handler that is not Python's"):
        SignalWatch(SIGNALS).open()
    monkeypatch.undo()
