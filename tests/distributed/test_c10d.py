"""Do real processes end every round alike over a c10d store, whoever fails, stops or dies?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import RankOutcome, free_port, run_ranks

pytestmark = pytest.mark.distributed

TIMEOUT_S = 60

# What every program below starts with: how a rank joins, and how it tells what a round came to.
PRELUDE = """
import gc, json, os, signal, sys, threading, time, weakref
from pathlib import Path
import torch.distributed as dist
from shardpoint.adapters.c10d import C10dComm, open_comm
from shardpoint.comm import SoloComm
from shardpoint.errors import *
from shardpoint.errors import Failure

RANK = int(os.environ["RANK"])
WORLD = int(os.environ["WORLD_SIZE"])
FOLDER = Path(os.environ["FOLDER"])
DEADLINE_S = 30.0

def join():
    if os.environ["STORE"] == "file":
        dist.init_process_group("gloo", init_method=f"file://{FOLDER}/store", rank=RANK, world_size=WORLD)
    else:
        dist.init_process_group("gloo")

def until(condition):
    give_up_at = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < give_up_at, "the condition did not come true"
        time.sleep(0.005)

def came_to(call):
    try:
        value = call()
    except BaseException as error:
        return {
            "type": type(error).__name__,
            "message": str(error),
            "cause": type(error.__cause__).__name__ if error.__cause__ is not None else None,
            "failures": {str(r): [f.type, f.message] for r, f in getattr(error, "failures", {}).items()},
            "waiting_for": getattr(error, "waiting_for", None),
            "details": error.details() if isinstance(error, CheckpointError) else None,
        }
    return value.decode() if isinstance(value, bytes) else value

def raises(error):
    def raise_it(*_args):
        raise error
    return raise_it

def never(_votes):
    raise AssertionError("decide ran")

def tell(report):
    print(json.dumps(report), flush=True)

def meet(name, ranks=range(WORLD)):
    (FOLDER / f"{name}{RANK}").touch()
    until(lambda: all((FOLDER / f"{name}{rank}").exists() for rank in ranks))
"""


def run(
    tmp_path: Path, program: str, world_size: int, *, store: str = "tcp", torchrun: bool = False, **env: str
) -> list[RankOutcome]:
    return run_ranks(
        PRELUDE + program,
        world_size,
        timeout_s=TIMEOUT_S,
        torchrun=torchrun,
        env={"FOLDER": str(tmp_path), "STORE": store, **env},
    )


def reports(outcomes: list[RankOutcome]) -> list[Any]:
    for outcome in outcomes:
        assert outcome.returncode == 0, outcome.stderr
    return [outcome.report() for outcome in outcomes]


EVERYDAY = """
join()
store = dist.group.WORLD.get_group_store()
dist.barrier()
num_keys_before = store.num_keys()
# Each rank's count of its comms stays in the store.
ours = lambda: [key for key in store.list_keys() if "shardpoint" in key and "/opened/" not in key]
comm = C10dComm()
agree = comm.agree
report = {}

def on(rank, error):
    return raises(error) if RANK == rank else lambda: b"fine"

report["success"] = came_to(lambda: agree("names", lambda: b"rank %d" % RANK, b" | ".join))
report["one failed"] = came_to(lambda: agree("write", on(1, ValueError("disk on fire")), never))
report["coordinator failed"] = came_to(lambda: agree("write", on(0, OSError("no space")), never))
report["all failed"] = came_to(lambda: agree("match", raises(NotFoundError("nothing there")), never))
decided = MismatchError("differs", missing=["a", "b"], unexpected=["c"], mismatched=["d"])
report["decided"] = came_to(lambda: agree("commit", lambda: b"", raises(decided)))
report["foreign"] = came_to(lambda: agree("commit", lambda: b"", raises(KeyError("plan"))))
report["interrupted"] = came_to(lambda: agree("write", on(1, KeyboardInterrupt()), never))
report["topics"] = came_to(lambda: agree("open" if RANK == 0 else "commit", lambda: b"", never))

block = bytes(range(256)) * 4096 * 20
def whole(votes):
    assert [len(vote) for vote in votes] == [len(block)] * WORLD
    assert votes[-1] == block[::-1]
    return votes[-1]
report["large"] = agree("large", lambda: block if RANK == 0 else block[::-1], whole) == block[::-1]

for number in range(100):
    assert agree(f"{number}", lambda: b"%d" % number, b",".join) == b"%d,%d" % (number, number)
# Left are one beat per rank, and the last verdict.
until(lambda: len(ours()) <= WORLD + 1)
assert store.num_keys() > num_keys_before
agree("all have counted", lambda: b"", lambda _: b"")
comm.close()
comm.close()
report["closed"] = came_to(lambda: agree("next", lambda: b"", never))
until(lambda: not ours())
bookkeeping = 1 if os.environ["STORE"] == "file" else 0  # a FileStore counts the clients that it has lost, under a key
until(lambda: store.num_keys() <= num_keys_before + bookkeeping + WORLD)
dist.barrier()
tell(report)
"""


@pytest.fixture(scope="module", params=["tcp", "file", "torchrun"])
def everyday(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    store = "file" if request.param == "file" else "tcp"
    folder = tmp_path_factory.mktemp("everyday")
    return reports(run(folder, EVERYDAY, 2, store=store, torchrun=request.param == "torchrun"))


def test_every_rank_gets_the_verdict(everyday: list[Any]) -> None:
    assert [report["success"] for report in everyday] == ["rank 0 | rank 1"] * 2


@pytest.mark.parametrize(
    "case, rank, failure",
    [
        ("one failed", 1, ["ValueError", "disk on fire"]),
        ("coordinator failed", 0, ["OSError", "no space"]),
        ("foreign", 0, ["KeyError", "'plan'"]),
    ],
)
def test_one_failure_is_the_same_error_on_all_and_has_its_cause_where_it_happened(
    everyday: list[Any], case: str, rank: int, failure: list[str]
) -> None:
    errors = [report[case] for report in everyday]
    assert [error["type"] for error in errors] == ["PeerError"] * 2
    assert [error["failures"] for error in errors] == [{str(rank): failure}] * 2
    assert errors[0]["details"] == errors[1]["details"]
    assert f"rank {rank} of 2" in errors[0]["message"]
    assert errors[rank]["cause"] == failure[0]
    assert errors[1 - rank]["cause"] is None


def test_where_all_fail_alike_each_raises_its_own(everyday: list[Any]) -> None:
    assert [report["all failed"]["type"] for report in everyday] == ["NotFoundError"] * 2
    assert [report["all failed"]["message"] for report in everyday] == ["nothing there"] * 2


def test_what_the_coordinator_refuses_all_refuse_with_its_attributes(everyday: list[Any]) -> None:
    details = {"missing": ["a", "b"], "unexpected": ["c"], "mismatched": ["d"]}
    assert [report["decided"]["type"] for report in everyday] == ["MismatchError"] * 2
    assert [report["decided"]["details"] for report in everyday] == [details] * 2


def test_an_interruption_goes_on_where_it_is_and_fails_the_others(everyday: list[Any]) -> None:
    assert everyday[1]["interrupted"]["type"] == "KeyboardInterrupt"
    assert everyday[0]["interrupted"]["failures"] == {"1": ["KeyboardInterrupt", ""]}


def test_ranks_in_different_rounds_fail_alike(everyday: list[Any]) -> None:
    assert [report["topics"]["type"] for report in everyday] == ["DistributedError"] * 2
    assert "'open'" in everyday[1]["topics"]["message"]


def test_a_vote_and_a_verdict_of_20_mib_travel_whole(everyday: list[Any]) -> None:
    assert [report["large"] for report in everyday] == [True] * 2


def test_no_key_stays_and_a_closed_comm_refuses(everyday: list[Any]) -> None:
    # That no key stays is asserted in the program, against the store itself.
    assert [report["closed"]["type"] for report in everyday] == ["DistributedError"] * 2
    assert "closed" in everyday[0]["closed"]["message"]


# How a rank of the programs below is lost. It tells its process id first, so that a stopped one can be ended.
LOST = """
join()
comm = C10dComm(silence_s=2.0, stall_s=60.0, heartbeat_s=0.2)
process_ids = json.loads(comm.agree("ids", lambda: b"%d" % os.getpid(), lambda v: b"[" + b",".join(v) + b"]"))
lost = int(os.environ["LOST"])
meet("ready")

def work():
    if RANK == lost:
        os.kill(os.getpid(), getattr(signal, os.environ["BY"]))
    return b""

began = time.monotonic()
first = came_to(lambda: comm.agree("write", work, never))
second = came_to(lambda: comm.agree("next", lambda: b"", never))
tell([first, second, time.monotonic() - began])
# Rank 0 may host the store that the others still need; and one of them ends the rank that is stopped.
others = sorted(set(range(WORLD)) - {lost})
meet("told", others)
if RANK == others[-1] and os.environ["BY"] == "SIGSTOP":
    os.kill(process_ids[lost], signal.SIGKILL)
"""


@pytest.mark.parametrize("by", ["SIGSTOP", "SIGKILL"])
@pytest.mark.parametrize("store, lost", [("tcp", 2), ("file", 1), ("tcp", 0), ("file", 0)])
def test_a_lost_rank_is_named_by_all_others_and_nobody_hangs(tmp_path: Path, store: str, lost: int, by: str) -> None:
    """A lost rank 0 takes a TCP store with it: stopped, the store's calls hang; killed, they fail."""
    outcomes = run(tmp_path, LOST, 3, store=store, LOST=str(lost), BY=by)
    assert outcomes.pop(lost).returncode == -9
    for first, second, seconds in reports(outcomes):
        assert first["type"] == "CollectiveTimeout", first
        assert first["waiting_for"] == [lost]
        assert second["type"] == "DistributedError"
        assert "can be used no more" in second["message"]
        assert seconds < 20


STALLED = """
join()
comm = C10dComm(silence_s=30.0, stall_s=2.0, heartbeat_s=0.1)
given_up = FOLDER / "given_up"

def work():
    if RANK == 2:
        until(given_up.exists)              # it beats, but moves nothing
    if RANK == 1:
        give_up_at = time.monotonic() + 1.0
        while time.monotonic() < give_up_at:
            comm.progress(1)
            time.sleep(0.05)
    return b""

report = came_to(lambda: comm.agree("write", work, never))
given_up.touch()
tell(report)
meet("told")  # rank 0 hosts the store, where rank 2 hears the verdict last
"""


def test_a_stalled_rank_is_given_up_by_all_itself_included(tmp_path: Path) -> None:
    errors = reports(run(tmp_path, STALLED, 3))
    assert [error["type"] for error in errors] == ["CollectiveTimeout"] * 3
    assert [error["waiting_for"] for error in errors] == [[2]] * 3
    assert "no progress" in errors[2]["message"]


SLOW = """
join()
comm = C10dComm(silence_s=1.0, stall_s=1.5, heartbeat_s=0.1)

def work():
    give_up_at = time.monotonic() + (6.0 if RANK == int(os.environ["SLOW"]) else 0.0)
    while time.monotonic() < give_up_at:
        comm.progress(1)
        time.sleep(0.05)
    return b"done"

tell(came_to(lambda: comm.agree("write", work, b" ".join)))
"""


@pytest.mark.parametrize("slow", ["0", "1"])
def test_a_rank_that_moves_bytes_is_waited_for(tmp_path: Path, slow: str) -> None:
    assert reports(run(tmp_path, SLOW, 3, SLOW=slow)) == ["done done done"] * 3


INTERRUPTED = """
join()
comm = C10dComm(silence_s=30.0, stall_s=60.0, heartbeat_s=0.1)
process_ids = json.loads(comm.agree("ids", lambda: b"%d" % os.getpid(), lambda v: b"[" + b",".join(v) + b"]"))
waits, heard = FOLDER / "waits", FOLDER / "heard"

if RANK == 0:
    def work():
        until(waits.exists)                 # rank 1 has voted, or is about to: it waits for the verdict
        began = time.monotonic()
        while not heard.exists():           # a handler that runs only when a wait returns is never this soon
            os.kill(process_ids[1], signal.SIGUSR1)
            assert time.monotonic() < began + 5.0
            time.sleep(0.1)
        return b""
    first = came_to(lambda: comm.agree("write", work, never))
else:
    def handler(*_):
        heard.touch()
        raise KeyboardInterrupt
    def work():
        signal.signal(signal.SIGUSR1, handler)
        waits.touch()
        return b""
    try:
        first = came_to(lambda: comm.agree("write", work, never))
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
second = came_to(lambda: comm.agree("next", lambda: b"", never))
tell([first, second])
"""


def test_a_waiting_rank_hears_signals_and_then_is_out(tmp_path: Path) -> None:
    coordinator, waiting = reports(run(tmp_path, INTERRUPTED, 2))
    assert waiting[0]["type"] == "KeyboardInterrupt"
    assert waiting[1]["type"] == "DistributedError"
    # Rank 1 may have been interrupted in its work (then it voted so), or, almost always, in its wait.
    assert coordinator[0]["type"] in {"PeerError", "AssertionError"}
    assert coordinator[1]["type"] == "CollectiveTimeout"
    assert coordinator[1]["waiting_for"] == [1]
    assert "left" in coordinator[1]["message"]


GROUPS = """
join()
pairs = [dist.new_group([0, 1]), dist.new_group([1, 2])]
mine = [number for number in range(2) if RANK in (number, number + 1)]
comms = {number: C10dComm(pairs[number]) for number in mine}
got = {}

def rounds(number):
    comm = comms[number]
    told = b"%d.%d" % (number, comm.rank)
    got[number] = [comm.agree("t", lambda: told, b" ".join).decode() for _ in range(100)]

threads = [threading.Thread(target=rounds, args=(number,)) for number in mine]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
outside = came_to(lambda: open_comm(pairs[1] if RANK == 0 else pairs[0])) if RANK != 1 else None
tell([{str(n): [comms[n].rank, comms[n].is_coordinator, sorted(set(got[n])), len(got[n])] for n in mine}, outside])
for comm in comms.values():
    comm.close()
dist.barrier()
"""


def test_two_groups_at_once_do_not_mix(tmp_path: Path) -> None:
    first, both, last = reports(run(tmp_path, GROUPS, 3))
    assert first[0] == {"0": [0, True, ["0.0 0.1"], 100]}
    assert both[0] == {"0": [1, False, ["0.0 0.1"], 100], "1": [0, True, ["1.0 1.1"], 100]}
    assert last[0] == {"1": [1, False, ["1.0 1.1"], 100]}
    assert first[1]["type"] == last[1]["type"] == "UsageError"


OPENED = """
assert isinstance(open_comm(), SoloComm)
join()
comm = open_comm()
assert open_comm() is comm and open_comm(dist.group.WORLD) is comm
pair = dist.new_group([0, 1])
other = open_comm(pair)
assert other is not comm and open_comm(pair) is other
assert comm.agree("t", lambda: b"a", b"".join) == b"aa"
assert other.agree("t", lambda: b"b", b"".join) == b"bb"
other.close()
another = open_comm(pair)
assert another is not other
assert another.agree("t", lambda: b"c", b"".join) == b"cc"
groups = [weakref.ref(group) for group in (dist.group.WORLD, pair)]
del pair
dist.barrier()
dist.destroy_process_group()
gc.collect()
assert [group() for group in groups] == [None, None], "a comm keeps a process group alive"
assert isinstance(open_comm(), SoloComm)
# A store of its own: gloo's keys of the first group would mislead the second one in the same store.
store = dist.TCPStore("127.0.0.1", int(os.environ["NEXT_PORT"]), WORLD, RANK == 0)
dist.init_process_group("gloo", store=store, rank=RANK, world_size=WORLD)
again = open_comm()
assert again is not comm
assert again.agree("t", lambda: b"%d" % RANK, b"".join) == b"01"
try:
    comm.agree("t", lambda: b"", never)
    raise AssertionError("the comm of a group that is gone still works")
except DistributedError:
    tell("ok")
"""


@pytest.mark.parametrize("torchrun", [False, True])
def test_open_comm_shares_one_comm_per_living_group(tmp_path: Path, torchrun: bool) -> None:
    assert reports(run(tmp_path, OPENED, 2, torchrun=torchrun, NEXT_PORT=str(free_port()))) == ["ok"] * 2


EXITS = """
join()
comm = open_comm()
coordinator_id = int(comm.agree("id", lambda: b"%d" % os.getpid(), lambda votes: votes[0]))
if RANK == 1:
    def gone():
        try:
            return Path(f"/proc/{coordinator_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True
    def fetch_late(number, fetch=comm._fetch_verdict):
        # Rank 0, which may host the store, ends long before rank 1 asks for the verdict: it is gone, unless it waits.
        until((FOLDER / "done").exists)
        give_up_at = time.monotonic() + 2.0
        while not gone() and time.monotonic() < give_up_at:
            time.sleep(0.01)
        return fetch(number)
    comm._fetch_verdict = fetch_late
report = came_to(lambda: comm.agree("last", lambda: b"", lambda _: b"verdict"))
(FOLDER / "done").touch()
tell(report)
"""


@pytest.mark.parametrize("store", ["tcp", "file"])
def test_a_program_that_ends_without_closing_still_delivers_its_last_verdict(tmp_path: Path, store: str) -> None:
    outcomes = run(tmp_path, EXITS, 2, store=store)
    assert reports(outcomes) == ["verdict"] * 2
    assert [outcome.stderr for outcome in outcomes] == ["", ""]


MISUSED = """
report = [came_to(lambda: C10dComm())]
join()
report.append(came_to(lambda: C10dComm(silence_s=1.0, heartbeat_s=1.0)))
comm = C10dComm()
child = os.fork()
if child == 0:
    comm.close()
    (FOLDER / "child").write_text(json.dumps(came_to(lambda: comm.agree("t", lambda: b"", never))))
    os._exit(0)
os.waitpid(child, 0)
report.append(json.loads((FOLDER / "child").read_text()))
report.append(came_to(lambda: comm.agree("t", lambda: b"", lambda _: b"fine")))
tell(report)
"""


def test_misuse_is_refused(tmp_path: Path) -> None:
    (report,) = reports(run(tmp_path, MISUSED, 1))
    assert [entry["type"] for entry in report[:3]] == ["UsageError"] * 3
    assert "init_process_group" in report[0]["message"]
    assert "forked child" in report[2]["message"]
    assert report[3] == "fine"


def test_the_launcher_tells_how_each_rank_ended() -> None:
    program = "import os, sys; print(os.environ['RANK']); sys.exit(3 * int(os.environ['RANK']))"
    assert [(one.returncode, one.report()) for one in run_ranks(program, 2, timeout_s=30)] == [(0, 0), (3, 1)]


@pytest.mark.parametrize("torchrun", [False, True])
def test_the_launcher_ends_ranks_that_hang(torchrun: bool) -> None:
    program = "import os, time; print('process', os.getpid(), flush=True); time.sleep(600 * int(os.environ['RANK']))"
    with pytest.raises(AssertionError, match=r"1 of \d processes still ran") as caught:
        run_ranks(program, 2, timeout_s=8, torchrun=torchrun)
    process_ids = re.findall(r"process (\d+)", str(caught.value))
    assert len(process_ids) == 2
    assert not any(is_running(int(process_id)) for process_id in process_ids)


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_report_that_is_no_json_is_not_taken_for_one() -> None:
    with pytest.raises(json.JSONDecodeError):
        RankOutcome(0, "no json\n", "").report()


# Rank 0 takes the votes of 1 and 2, and 1 that of 3.
TREE = """
join()
store = dist.group.WORLD.get_group_store()
# Each rank's count of its comms stays in the store.
ours = lambda: [key for key in store.list_keys() if "shardpoint" in key and "/opened/" not in key]
comm = C10dComm(silence_s=20.0, stall_s=60.0, heartbeat_s=0.1, fanout=2)
agree = comm.agree
report = {}

def on(rank, error):
    return raises(error) if RANK == rank else lambda: b"fine"

def union(votes):
    assert len(votes) <= 3
    return b" ".join(sorted(b" ".join(votes).split()))

report["in order"] = came_to(lambda: agree("names", lambda: b"%d" % RANK, b" ".join))
report["merged"] = came_to(lambda: agree("names", lambda: b"%d" % RANK, b"|".join, union))
report["leaf"] = came_to(lambda: agree("write", on(3, ValueError("disk on fire")), never, union))
report["interior"] = came_to(lambda: agree("write", on(1, ValueError("disk on fire")), never, union))
report["interrupted"] = came_to(lambda: agree("write", on(1, KeyboardInterrupt()), never, union))
report["topics"] = came_to(lambda: agree("open" if RANK == 3 else "commit", lambda: b"", never, union))
block = os.urandom(3 << 20)
report["large"] = came_to(lambda: agree("large", lambda: block, lambda votes: b"%d" % len(votes[0]), b"".join))
for number in range(30):
    assert agree(f"{number}", lambda: b"%d" % RANK, lambda votes: votes[0], union) == b"0 1 2 3"
until(lambda: len(ours()) <= WORLD + 1)  # one beat per rank, and the last verdict
meet("all have counted")
if RANK == 1 and os.environ["LOSE"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
comm._silence_s = 2.0
report["lost"] = came_to(lambda: agree("commit", lambda: b"%d" % RANK, lambda votes: votes[0], union))
tell(report)
meet("told", [0, 2, 3] if os.environ["LOSE"] == "1" else range(WORLD))
"""


@pytest.mark.parametrize("lose", [False, True])
def test_votes_travel_up_a_tree_of_processes(tmp_path: Path, lose: bool) -> None:
    outcomes = run(tmp_path, TREE, 4, LOSE=str(int(lose)))
    if lose:
        assert outcomes.pop(1).returncode == -9
    told = reports(outcomes)
    for report in told:
        assert report["in order"] == report["merged"] == "0 1 2 3"
        assert report["leaf"]["failures"] == {"3": ["ValueError", "disk on fire"]}
        assert report["interior"]["failures"] == {"1": ["ValueError", "disk on fire"]}
        assert report["topics"]["type"] == "DistributedError"
        assert report["large"] == str(4 * 3 * 2**20)
        if lose:
            assert report["lost"]["waiting_for"] == [1]
        else:
            assert report["lost"] == "0 1 2 3"
    if not lose:
        assert told[1]["interrupted"]["type"] == "KeyboardInterrupt"
        assert [told[rank]["interrupted"]["failures"] for rank in (0, 2, 3)] == [{"1": ["KeyboardInterrupt", ""]}] * 3
