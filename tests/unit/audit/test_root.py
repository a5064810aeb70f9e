"""What does an audit say of journals that were written by hand, one fault at a time?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from awscrt import checksums

from shardpoint.audit import AuditReport, audit_root
from shardpoint.errors import NotFoundError, UnsupportedFormatError
from shardpoint.storage import LocalStore


def life(name: str, origin: int | None = None, **fields: Any) -> dict[str, Any]:
    resumed = None
    if origin is not None:
        resumed = {"name": f"epoch-0_step-{origin}", "checkpoint_id": "0" * 32, "epoch": 0, "step": origin}
    return {
        "kind": "life",
        "version": 1,
        "life": name,
        "incarnation": 1,
        "library": "shardpoint 0.1.0",
        "started_utc": "2026-11-24T12:00:00Z",
        "host": "node-17",
        "world_size": 2,
        "layout": "S(0) over 2 cpu",
        "versions": {"torch": "2.13.0"},
        "num_samples": 100,
        "resumed_from": resumed,
        "passed_over": [],
    } | fields


def samples(*indices: int) -> dict[str, Any]:
    data = b"".join(index.to_bytes(8, "little", signed=True) for index in indices)
    return {"count": len(indices), "crc64nvme": f"{checksums.crc64nvme(data):016x}", "indices": list(indices)}


def step(name: str, number: int, epoch: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "life": name,
        "epoch": epoch,
        "step": number,
        "loss": 1 / number,
        "grad_norm": 2 / number,
        "optimizers": {"": {"learning_rates": [0.1 / number], "steps": float(number)}},
        "samples": samples(2 * number - 2, 2 * number - 1),
        "rng": f"{number:016x}",
    } | fields


def steps(name: str, numbers: range, **fields: Any) -> list[dict[str, Any]]:
    return [step(name, number, **fields) for number in numbers]


def audited(root: Path, *lines: dict[str, Any] | str) -> AuditReport:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (root / "journal.jsonl").write_text(text)
    return audit_root(LocalStore(root))


def resumed(root: Path, *changed: dict[str, Any], **header: Any) -> AuditReport:
    """Audit a run that was killed at step 12 after a commit at 8, and then did 9 to 14, some of them otherwise."""
    again = {number: step("b", number) for number in range(9, 15)} | {line["step"]: line for line in changed}
    return audited(root, life("a"), *steps("a", range(1, 13)), life("b", 8, **header), *again.values())


def only_difference(report: AuditReport) -> tuple[str, int, str]:
    (compared,) = report.comparisons
    assert not report.ok
    assert compared.difference is not None
    return compared.difference.cause, compared.difference.step, compared.message


def test_a_true_resume(tmp_path: Path) -> None:
    report = resumed(tmp_path)
    assert report.ok
    assert report.num_compared == 4
    assert list(report.lines()) == [
        "life 1: started afresh, steps 1-12, 2 ranks (S(0) over 2 cpu)",
        "life 2: resumed from epoch-0_step-8, steps 9-14, 2 ranks (S(0) over 2 cpu)",
        "life 2 against life 1: bit-exact for steps 9-12",
        "ok: every step that was done twice (4) is bit-exact; nothing else is wrong",
    ]


ONE_BIT = float.fromhex((0.1).hex()[:-5] + "b" + (0.1).hex()[-4:])


@pytest.mark.parametrize(
    "changed, cause, number, text",
    [
        (step("b", 10, samples=samples(18, 20)), "data", 10, "the samples [18, 19] then, [18, 20] now"),
        (step("b", 9, samples=samples(17, 16)), "data", 9, "the samples [16, 17] then, [17, 16] now"),
        (step("b", 11, rng="f" * 16), "rng", 11, f"{11:016x} then, {'f' * 16} now"),
        (
            step("b", 9, optimizers={"": {"learning_rates": [0.2], "steps": 9.0}}),
            "optimizer",
            9,
            "the learning rate is 0.011111111111111112 then, 0.2 now",
        ),
        (
            step("b", 9, optimizers={"": {"learning_rates": [0.1 / 9], "steps": 1.0}}),
            "optimizer",
            9,
            "it has counted 9 steps then, 1 now",
        ),
        (step("b", 12, grad_norm=0.5), "optimizer", 12, "the gradient norm is 0.16666666666666666 then, 0.5 now"),
        (step("b", 9, loss=0.5), "loss", 9, "the loss is 0.1111111111111111 then, 0.5 now"),
        (step("b", 10, loss=ONE_BIT), "optimizer", 10, "though the loss and gradient norm of step 9 is equal"),
        (step("b", 10, loss="nan"), "optimizer", 10, "the loss is 0.1 then, nan now"),
        # causes before effects, however many of them differ
        (step("b", 9, loss=0.5, rng="f" * 16, samples=samples(1, 2)), "data", 9, "data: "),
        (step("b", 9, loss=0.5, rng="f" * 16), "rng", 9, "RNG: "),
    ],
)
def test_the_first_thing_that_differs_is_named(
    changed: dict[str, Any], cause: str, number: int, text: str, tmp_path: Path
) -> None:
    assert ONE_BIT != 0.1
    found, where, message = only_difference(resumed(tmp_path, changed))
    assert (found, where) == (cause, number)
    assert message.startswith(f"differs first in step {number}: ")
    assert text in message


def test_the_first_step_that_differs_counts_not_the_worst(tmp_path: Path) -> None:
    late = step("b", 12, samples=samples(1, 2))
    cause, number, _ = only_difference(resumed(tmp_path, late, step("b", 10, rng="f" * 16)))
    assert (cause, number) == ("rng", 10)


def test_equal_nans_are_equal(tmp_path: Path) -> None:
    first = [step("a", number, loss="nan" if number == 3 else 1.0) for number in (1, 2, 3)]
    again = [step("b", 2, loss=1.0), step("b", 3, loss="nan")]
    assert audited(tmp_path, life("a"), *first, life("b", 1), *again).ok


def test_another_topology_is_not_comparable(tmp_path: Path) -> None:
    report = resumed(tmp_path, step("b", 11, loss=(1 / 11) * (1 + 1e-6), rng="f" * 16), world_size=1, layout="whole")
    cause, number, message = only_difference(report)
    assert (cause, number) == ("topology", 9)
    assert message == (
        "not comparable bit for bit: 2 ranks then, 1 now; steps 9-12 differ by up to 1.0e-06 of the loss (step 11)"
    )
    (compared,) = report.comparisons
    assert compared.largest_relative == pytest.approx(1e-6, rel=1e-3)
    report = resumed(tmp_path, layout="replicated, cpu")
    assert "S(0) over 2 cpu then, replicated, cpu now" in only_difference(report)[2]


def test_other_data_on_another_topology_are_other_data(tmp_path: Path) -> None:
    report = resumed(tmp_path, step("b", 10, samples=samples(18, 20)), world_size=1)
    assert only_difference(report)[:2] == ("data", 10)


def test_other_versions_are_told_with_what_differs(tmp_path: Path) -> None:
    report = resumed(tmp_path, step("b", 9, loss=0.5), versions={"torch": "2.14.0"})
    assert only_difference(report)[2].endswith("(torch 2.13.0 then, 2.14.0 now)")
    assert resumed(tmp_path, versions={"torch": "2.14.0"}).ok


def test_each_life_is_compared_with_the_last_that_did_the_step(tmp_path: Path) -> None:
    report = audited(
        tmp_path,
        life("a"),
        *steps("a", range(1, 7)),
        life("b", 2),
        *steps("b", range(3, 5)),
        life("c", 2),
        *steps("c", range(3, 7)),
    )
    told = [(item.now, item.then, item.first[1], item.last[1]) for item in report.comparisons]
    assert told == [("life 2", "life 1", 3, 4), ("life 3", "life 2", 3, 4), ("life 3", "life 1", 5, 6)]
    assert report.ok


def kinds(report: AuditReport) -> list[str]:
    return [finding.kind for finding in report.findings]


def test_a_step_that_no_life_did_is_a_gap(tmp_path: Path) -> None:
    report = audited(tmp_path, life("a"), *steps("a", range(1, 5)), life("b", 4), *steps("b", range(6, 8)))
    assert kinds(report) == ["gap"]
    assert "between step 4 and step 6" in report.findings[0].message
    # The first life did step 5, but the second one went back behind it: it does not count.
    report = audited(tmp_path, life("a"), *steps("a", range(1, 6)), life("b", 4), *steps("b", range(6, 8)))
    assert kinds(report) == ["gap"]
    assert kinds(audited(tmp_path, life("a"), *steps("a", range(3, 5)))) == ["gap"]
    assert kinds(audited(tmp_path, life("a", 2), *steps("a", range(3, 5)))) == []
    assert kinds(audited(tmp_path, life("a", 2), *steps("a", range(4, 5)))) == ["gap"]


def test_a_step_twice_in_one_life(tmp_path: Path) -> None:
    assert kinds(audited(tmp_path, life("a"), step("a", 1), step("a", 1, samples=samples(9)))) == ["twice"]


def test_samples_that_a_resume_took_again(tmp_path: Path) -> None:
    again = [step("b", 3, samples=samples(0, 1)), step("b", 4, samples=samples(2, 9))]
    report = audited(tmp_path, life("a"), *steps("a", range(1, 3)), life("b", 2), *again)
    assert kinds(report) == ["repeated"]
    assert report.findings[0].message == (
        "3 samples were taken twice in epoch 0: first sample 0, in step 1 and again in step 3"
    )


def test_a_sampler_that_draws_with_replacement_is_no_fault(tmp_path: Path) -> None:
    lines = [step("a", 1, samples=samples(4, 4)), step("a", 2, samples=samples(4, 7))]
    report = audited(tmp_path, life("a"), *lines, life("b", 2), step("b", 3, samples=samples(7)))
    assert report.ok
    assert "within one life" in report.notes[0]


def test_samples_that_an_epoch_never_took(tmp_path: Path) -> None:
    first = steps("a", range(1, 4))  # 0 to 5
    following = step("b", 1, epoch=1)
    report = audited(tmp_path, life("a", num_samples=8), *first, life("b", 3, num_samples=8), following)
    assert kinds(report) == ["skipped"]
    assert report.findings[0].message == "2 of 8 samples were never taken in epoch 0: first sample 6"
    report = audited(tmp_path, life("a", num_samples=7), *first, life("b", 3, num_samples=7), following)
    assert report.ok
    assert report.notes == ["epoch 0: its last 1 samples fill no step, and were left out"]


@pytest.mark.parametrize("second", [(1, 1), (1, 0), (1, 3)], ids=str)
def test_an_epoch_may_count_its_steps_anew_or_not(second: tuple[int, int], tmp_path: Path) -> None:
    epoch, number = second
    following = step("a", number or 1, epoch=epoch) | {"step": number}
    assert kinds(audited(tmp_path, life("a", num_samples=4), *steps("a", range(1, 3)), following)) == []
    assert kinds(audited(tmp_path, life("a"), step("a", 1), step("a", 5, epoch=1))) == ["gap", "skipped"]


# ---- what is left of a journal


def test_a_line_that_a_death_cut_short_is_told_and_no_fault(tmp_path: Path) -> None:
    torn = json.dumps(step("a", 5))[:-20]
    report = audited(tmp_path, life("a"), *steps("a", range(1, 5)), torn, life("b", 2), *steps("b", range(3, 5)))
    assert report.ok
    assert report.num_compared == 2
    assert report.notes == ["line 6 of the journal was cut short when its life ended"]
    assert audited(tmp_path, life("a"), step("a", 1), torn).ok


def test_a_damaged_line_is_a_fault(tmp_path: Path) -> None:
    report = audited(tmp_path, life("a"), step("a", 1), "{damaged", *steps("a", range(2, 4)))
    assert kinds(report) == ["damaged"]
    assert "line 3" in report.findings[0].message
    assert kinds(audited(tmp_path, life("a"), step("a", 1) | {"loss": "low"}, step("a", 2))) == ["damaged", "gap"]


def test_a_life_whose_beginning_is_lost(tmp_path: Path) -> None:
    report = audited(tmp_path, life("a"), *steps("a", range(1, 5)), *steps("b", range(3, 6)))
    assert report.ok
    assert report.num_compared == 2
    assert "the first line of life 2 is lost" in report.notes[0]


def test_what_a_resume_passed_over_is_told(tmp_path: Path) -> None:
    report = resumed(tmp_path, passed_over=[{"name": "epoch-0_step-12", "reason": "it is damaged"}])
    assert report.notes == ["life 2 passed over epoch-0_step-12: it is damaged"]


def test_unknown_lines_and_fields_are_left_out_and_newer_versions_refused(tmp_path: Path) -> None:
    report = audited(tmp_path, life("a", later=1), {"kind": "weather", "sun": True}, step("a", 1, moon=2))
    assert report.ok
    with pytest.raises(UnsupportedFormatError, match="version 2"):
        audited(tmp_path, life("a", version=2))
    (tmp_path / "journal.jsonl").unlink()
    with pytest.raises(NotFoundError, match=r"Checkpointer\.journal\.record"):
        audit_root(LocalStore(tmp_path))


def test_steps_without_samples_say_so(tmp_path: Path) -> None:
    report = audited(tmp_path, life("a"), step("a", 1, samples=None))
    assert report.notes == ["no step recorded its samples, so the data were not compared"]


def test_against_another_run(tmp_path: Path) -> None:
    reference, root = tmp_path / "reference", tmp_path / "root"
    for directory in (reference, root):
        directory.mkdir()
    audited(reference, life("a"), *steps("a", range(1, 15)))
    assert resumed(root, step("b", 14, loss=0.5)).ok
    report = audit_root(LocalStore(root), LocalStore(reference))
    assert [item.then for item in report.comparisons] == ["life 1"] + [f"life 1 of {reference}"] * 2
    assert [item.message.partition(":")[0] for item in report.comparisons] == [
        "bit-exact for steps 9-12",
        "bit-exact for steps 1-8",
        "differs first in step 14",
    ]
    assert not report.ok


def test_a_run_that_nothing_interrupted_compares_nothing_and_says_so(tmp_path: Path) -> None:
    report = audited(tmp_path, life("a"), *steps("a", range(1, 3)))
    assert report.ok
    assert list(report.lines())[-1] == "ok: no step was done twice, so nothing was compared; nothing else is wrong"
