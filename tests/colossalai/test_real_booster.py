"""Do the four functions work with the real ColossalAI, and does a run of it go on natively?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("program.py")
PLUGINS = ("ddp", "zero1", "zero2", "gemini", "hybrid")
OF_EACH = (
    "goes_on",
    "is_all_or_nothing",
    "refuses_what_would_be_skipped",
    "refuses_another_optimizer",
    "goes_on_natively",
)
ON_ANY = [
    *(f"{plugin}_{check}" for plugin in PLUGINS for check in OF_EACH),
    *(f"{plugin}_sixteen_bits_are_told" for plugin in ("zero1_bf16", "zero1_fp16", "hybrid_bf16", "hybrid_zero1_bf16")),
    *(f"{plugin}_sixteen_bits_go_on_natively" for plugin in ("zero1_bf16", "zero1_fp16", "hybrid_zero1_bf16")),
    *(f"{plugin}_goes_on_with_lora" for plugin in ("ddp", "zero1", "hybrid")),
    "ddp_native_hybrid_adam",
    "gemini_native_hybrid_adam",
    "gemini_script",
    "zero2_script",
    "gemini_script_with_other_imports",
    "zero2_script_with_other_imports",
    "what_shardpoint_wrote_is_not_given_to_it",
    "tied_weights_that_gemini_cannot_load",
]
ON_TWO = [
    *(f"{plugin}_{check}" for plugin in ("tp2", "pp2") for check in OF_EACH),
    "tp2_zero1_bf16_sixteen_bits_are_told",
    "tp2_zero1_bf16_sixteen_bits_go_on_natively",
    "3d_script",
    "3d_script_with_other_imports",
    "a_padded_vocabulary",
]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run(1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run(2, tmp_path_factory.mktemp("two"))


def run(world_size: int, out: Path) -> list[dict[str, str]]:
    return [one.report() for one in run_ranks(PROGRAM, world_size, timeout_s=400.0, args=[str(out)])]


def assert_ok(name: str, reports: list[dict[str, str]]) -> None:
    for rank, report in enumerate(reports):
        assert report.get(name, "was not reached").startswith("ok"), f"rank {rank}: {report.get(name, 'not reached')}"


@pytest.mark.parametrize("name", ON_ANY)
def test_on_one_rank(name: str, one_rank: list[dict[str, str]]) -> None:
    assert_ok(name, one_rank)


@pytest.mark.parametrize("name", ON_ANY + ON_TWO)
def test_on_two_ranks(name: str, two_ranks: list[dict[str, str]]) -> None:
    assert_ok(name, two_ranks)


def test_no_check_of_the_program_is_left_out(one_rank: list[dict[str, str]], two_ranks: list[dict[str, str]]) -> None:
    assert [set(report) for report in one_rank] == [set(ON_ANY)]
    assert [set(report) for report in two_ranks] == [set(ON_ANY + ON_TWO)] * 2
