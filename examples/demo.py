"""What does Shardpoint promise, and does it hold on this machine? The five results that `make demo` shows.

Each is obtained by running `examples/sft.py` as a user would, on 2 FSDP ranks on the CPU, and is checked from outside:
by exit codes, by the files, and by the losses in the runs' journals. It empties `demo/runs`, fills it again (8 GB in
the end), and leaves the log of every run in `demo/logs`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shardpoint.journal import as_float, read_journal, timeline
from shardpoint.storage import LocalStore

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
RUNS, LOGS = DEMO / "runs", DEMO / "logs"
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NUM_STEPS, SAVE_EVERY = 12, 4
QUESTION = "What does `shutil.copytree` do?"
FLIPPED = "model.layers.10.mlp.down_proj.weight"
TIMEOUT_S = 600.0
LIMIT_S, LIMIT_GB = 480, 12

console = Console(highlight=False)


class DemoError(Exception):
    """A result does not hold; the message says why."""


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    title: str
    held: bool
    evidence: str
    seconds: float


def require(held: object, why: str) -> None:
    if not held:
        raise DemoError(why)


# ---- running things, and reading what they left --------------------------------------------------------------------


def call(name: str, command: list[str], *, watch: Path | None = None) -> tuple[int, str]:
    """Run a command with its output in a log; return its exit code and output.

    Raises:
        DemoError: it took longer than TIMEOUT_S.
    """
    log, deadline = LOGS / f"{name}.log", time.monotonic() + TIMEOUT_S
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # what torchrun would choose too, with a warning
    with log.open("w") as file, console.status(name) as status:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                require(time.monotonic() < deadline, f"it took more than {TIMEOUT_S:.0f} s; see {log}")
                lines = watch.read_text().splitlines() if watch is not None and watch.exists() else []
                status.update(f"{name} {escape(lines[-1] if lines else '')}")
                time.sleep(0.2)
        finally:
            process.terminate()  # nothing, when it has ended
            process.wait()
    return process.returncode, log.read_text(errors="replace")


def train(name: str, root: Path, *options: str, ranks: int = 2, survives: bool = True) -> str:
    """Run the example; return its output.

    Raises:
        DemoError: it failed, or did not where it should have; the message ends with the tail of its log.
    """
    launch = (
        [*TWO_RANKS, str(HERE / "sft.py"), "--plugin", "fsdp"] if ranks == 2 else [sys.executable, str(HERE / "sft.py")]
    )
    settings = ["--root", str(root), "--steps", str(NUM_STEPS), "--save-every", str(SAVE_EVERY), "--keep", "2"]
    settings += ["--micro-batches", "2", "--micro-batch", "2"]  # fewer and larger ones are quicker on 2 cores
    code, output = call(name, [*launch, *settings, *options], watch=root / "journal.jsonl")
    own_output = output.partition("torch/distributed/elastic/")[
        0
    ]  # then torchrun reports, at length, that a rank failed
    tail = "\n".join(own_output.splitlines()[-30:])
    require((code == 0) == survives, f"{name} ended with exit code {code}; see {LOGS / name}.log, which says:\n{tail}")
    return output


def losses_of(root: Path) -> dict[int, float]:
    """Return step -> loss as the run's journal has it, every bit; of steps done more than once the last."""
    counting = timeline(read_journal(LocalStore(root)).lives)
    losses = {step.step: as_float(step.loss) for step, _ in counting}
    require(len(losses) == len(counting), f"the journal of {root} has a step twice")
    return losses


def audit_of(name: str, root: Path) -> str:
    """Return what `shardpoint audit` says of the last life of a run."""
    code, output = call(f"{name}-audit", [str(Path(sys.executable).parent / "shardpoint"), "audit", str(root)])
    lines = [line for line in output.splitlines() if " against " in line]
    require(lines, f"the audit compared nothing: {output}")
    require(code == 0, f"the audit ended with exit code {code}: {output}")
    return lines[-1].rpartition(": ")[2]


def committed_steps(root: Path) -> list[int]:
    """Return the steps whose checkpoints are visible in a root."""
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in root.glob("epoch-*/shardpoint.json"))


def differing(losses: dict[int, float], reference: dict[int, float]) -> list[int]:
    """Return the steps whose losses are not equal, or are in one only."""
    return sorted(step for step in losses.keys() | reference.keys() if losses.get(step) != reference.get(step))


# ---- the five results ----------------------------------------------------------------------------------------------


def uninterrupted() -> str:
    root = RUNS / "a"
    output = train("a", root)
    require("resumed from step 0" in output, "it did not start afresh")
    losses = losses_of(root)
    require(list(losses) == list(range(1, NUM_STEPS + 1)), f"the log has the steps {list(losses)}")
    require(committed_steps(root) == [8, 12], f"the committed steps are {committed_steps(root)}, not the last two")
    begin, end = (sum(losses[step] for step in steps) / 4 for steps in (range(1, 5), range(9, 13)))
    return f"mean loss {begin:.2f} in steps 1 to 4, {end:.2f} in steps 9 to 12; checkpoints 8 and 12 kept, 4 pruned"


def killed_and_restarted() -> str:
    root = RUNS / "b"
    output = train("b-killed", root, "--kill", "rank=1,step=8", survives=False)
    died = re.search(r"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9 ", output)
    require(died, "rank 1 was not killed by SIGKILL")
    keep_journal(root, "b-killed")
    require(list(losses_of(root)) == list(range(1, 9)), f"the killed run recorded the steps {list(losses_of(root))}")
    require(not (root / "epoch-0_step-8").exists(), "the save that was killed is visible")
    require(committed_steps(root) == [4], f"after the kill the committed steps are {committed_steps(root)}")
    torn = list((root / ".shardpoint").glob("*/*epoch-0_step-8*"))
    require(len(torn) == 1, f"the torn attempt at step 8 is not there: {torn}")
    require(not (torn[0] / "shardpoint.json").exists(), "the torn attempt has a manifest")
    written = share_written(torn[0], RUNS / "a" / "epoch-0_step-8")
    require(0 < written < 1, f"{written:.0%} of the tensors' bytes were written before the kill: not in the middle")
    output = train("b-restarted", root)
    require("resumed from step 4" in output, "the restart did not resume from step 4")
    require(not list((root / ".shardpoint").glob("*/*epoch-0_step-8*")), "the torn attempt was not swept")
    require(committed_steps(root) == [8, 12], f"the committed steps are {committed_steps(root)}")
    steps = differing(losses_of(root), losses_of(RUNS / "a"))
    require(not steps, f"the losses of the steps {steps} differ from (a)")
    keep_journal(root, "b-restarted")  # (e) goes on in this root
    audited = audit_of("b", root)
    require(audited == "bit-exact for steps 5-8", f"the audit says: {audited}")
    return (
        f"killed with {written:.0%} of step 8 written, invisible; resumed from step 4; all 12 losses equal to (a); "
        f"audit: {audited}"
    )


def keep_journal(root: Path, name: str) -> None:
    (RUNS / name).mkdir()
    shutil.copy(root / "journal.jsonl", RUNS / name)


def share_written(torn: Path, whole: Path) -> float:
    """Return the share of the tensor files' bytes, in blocks of 1 MiB, that are there already."""
    same = total = 0
    for path in torn.rglob("*.safetensors"):
        with path.open("rb") as found, (whole / path.relative_to(torn)).open("rb") as expected:
            while block := expected.read(2**20):
                total += len(block)
                same += len(block) * (found.read(2**20) == block)
    return same / total if total else 0.0


def reshaped() -> str:
    root = RUNS / "c"
    shutil.copytree(RUNS / "a" / "epoch-0_step-8", root / "epoch-0_step-8")
    output = train("c", root, ranks=1)
    require("resumed from step 8" in output, "it did not resume from step 8")
    losses, reference = losses_of(root), losses_of(RUNS / "a")
    require(list(losses) == [9, 10, 11, 12], f"the log has the steps {list(losses)}")
    worst = max(abs(loss - reference[step]) for step, loss in losses.items())
    require(worst <= 1e-4, f"the losses differ from (a) by up to {worst:.1e}")
    agreement = f"within {worst:.0e} of" if worst else "equal to"
    return f"saved by 2 FSDP ranks, resumed from step 8 by 1 rank without a plugin; losses {agreement} (a)"


def opened_and_asked() -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging  # noqa: PLC0415 - the runs need not wait for it

    logging.disable_progress_bar()
    directory = RUNS / "a" / f"epoch-0_step-{NUM_STEPS}" / "modeling"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    faults = {what: names for what, names in loading.items() if names}
    require(not faults, f"from_pretrained reports {faults}")
    before = AutoModelForCausalLM.from_pretrained(DEMO / "SmolLM2-135M-Instruct")
    require(not model.lm_head.weight.equal(before.lm_head.weight), "the weights are those from before the training")
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    require(len(answer.split()) >= 3, f"it answered {answer!r}")
    return f"{QUESTION}\n{answer}"


def damaged_and_fallen_back() -> str:
    root = RUNS / "b"
    modeling = root / f"epoch-0_step-{NUM_STEPS}" / "modeling"
    index = modeling / "model.safetensors.index.json"
    file = modeling / json.loads(index.read_text())["weight_map"][FLIPPED]
    flip_a_byte(file, FLIPPED)
    code, output = call("e-verify", [str(Path(sys.executable).parent / "shardpoint"), "verify", str(root)])
    require(code == 20, f"verify ended with exit code {code}, not 20")
    require(file.name in output and FLIPPED in output, f"verify names not both {file.name} and {FLIPPED}: {output}")
    require(re.search(r"^ok +epoch-0_step-8:", output, re.MULTILINE), f"verify does not find step 8 intact: {output}")
    output = train("e", root, "--steps", "9")
    require("resumed from step 8" in output, "it did not fall back to step 8")
    losses, reference = losses_of(root), losses_of(RUNS / "a")
    require(losses == {step: reference[step] for step in range(1, 10)}, "the losses up to step 9 differ from (a)")
    return f"verify: exit 20, {file.name}, {FLIPPED}; resume fell back to step 8; the loss of step 9 equal to (a)"


def flip_a_byte(file: Path, tensor: str) -> None:
    """Flip every bit of the byte in the middle of a tensor in a safetensors file."""
    with file.open("r+b") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        begin, end = json.loads(stream.read(header_bytes))[tensor]["data_offsets"]
        position = 8 + header_bytes + (begin + end) // 2
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 0xFF]))


# ---- the report ----------------------------------------------------------------------------------------------------


class MemoryWatch(threading.Thread):
    """Find the most memory that this process and all its descendants had at once, each shared page counted once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        """Look once a second."""
        while not self._stopped.wait(1.0):
            self.peak_bytes = max(self.peak_bytes, sum(map(resident_bytes, process_tree(os.getpid()))))

    def stop(self) -> float:
        """Stop, and return the peak in GB."""
        self._stopped.set()
        self.join()
        return self.peak_bytes / 1e9


def process_tree(pid: int) -> list[int]:
    """Return a process and its descendants, as far as they are still there."""
    tree = [pid]
    for parent in tree:  # grows while it is walked
        for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                tree += map(int, tasks.read_text().split())
            except OSError:
                continue  # it ended meanwhile
    return tree


def resident_bytes(pid: int) -> int:
    """Return a process's proportional set size; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def draw_losses(path: Path) -> str:
    """Overlay the losses of (a), (b) and (c), with the kill marked."""
    import matplotlib as mpl  # noqa: PLC0415 - as for transformers

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(8, 4.5))
    curves: list[tuple[str, str, dict[str, Any]]] = [
        ("a", "(a) uninterrupted, 2 ranks", {"color": "0.6", "linewidth": 6}),
        ("b-killed", "(b) until the kill", {"color": "tab:red", "linestyle": "--", "marker": "o"}),
        ("b-restarted", "(b) restarted from step 4", {"color": "tab:blue", "marker": "o", "markersize": 4}),
        ("c", "(c) from step 8 on 1 rank", {"color": "tab:green", "marker": "x", "markersize": 9}),
    ]
    for run, label, style in curves:
        points = list(losses_of(RUNS / run).items()) if (RUNS / run / "journal.jsonl").exists() else []
        if points:
            axes.plot(*zip(*points[4 * (run == "b-restarted") :], strict=True), label=label, **style)
    axes.axvline(8, color="tab:red", linewidth=1)
    axes.annotate(
        "rank 1 killed while saving", (8, axes.get_ylim()[1]), (4, -12), textcoords="offset points", color="tab:red"
    )
    axes.set(xlabel="step", ylabel="loss", title="SmolLM2-135M-Instruct on docstrings: killed, restarted, reshaped")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return str(path)


def show(title: str, obtain: Callable[[], str]) -> Result:
    """Obtain one result; what goes wrong on the way makes it a result that does not hold."""
    began = time.monotonic()
    console.print(f"{title} ...")
    try:
        held, evidence = True, obtain()
    except Exception as error:  # noqa: BLE001 - whatever goes wrong, the other results and the table are wanted
        console.print(f"{type(error).__name__}: {error}", markup=False)
        held, evidence = False, str(error).partition("\n")[0]
    return Result(title, held, evidence, time.monotonic() - began)


def main() -> int:
    """Show the five results; return 0 if all hold."""
    DEMO.mkdir(exist_ok=True)
    lock = (DEMO / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        console.print(f"another demo is running in {DEMO}")
        return 1
    began, memory = time.monotonic(), MemoryWatch()
    memory.start()
    for directory in (RUNS, LOGS):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    results = [
        show("(a) 12 steps on 2 FSDP ranks, a save every 4", uninterrupted),
        show("(b) rank 1 killed in the save at step 8, restarted", killed_and_restarted),
        show("(c) step 8 resumed on 1 rank", reshaped),
        show("(d) modeling/ opened with from_pretrained", opened_and_asked),
        show("(e) one byte flipped in the newest checkpoint", damaged_and_fallen_back),
    ]
    drawn = show("the losses drawn", lambda: draw_losses(DEMO / "loss.png"))

    table = Table(show_lines=True)
    for heading in ("result", "holds", "evidence", "seconds"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left", overflow="fold")
    for result in results:
        holds = "[green]yes[/]" if result.held else "[bold red]NO[/]"
        table.add_row(escape(result.title), holds, escape(result.evidence), f"{result.seconds:.0f}")
    console.print(table)
    seconds, peak_gb = time.monotonic() - began, memory.stop()
    console.print(f"{seconds:.0f} s (at most {LIMIT_S}), {peak_gb:.1f} GB of memory at the peak (at most {LIMIT_GB})")
    console.print(f"losses: {drawn.evidence}; logs: {LOGS}; checkpoints: {RUNS}")
    return 0 if all(result.held for result in [*results, drawn]) else 1


if __name__ == "__main__":
    sys.exit(main())
