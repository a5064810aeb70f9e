from __future__ import annotations

import pytest

from benchmarks.cases.tables import table_of
from benchmarks.contenders import ENTRIES
from benchmarks.report import Table
from benchmarks.targets import TARGETS, judge


def saves(mine: list[float]) -> dict[str, Table]:
    seconds = {"shardpoint": mine, "raw_direct": [0.9] * 3, "dcp_1": [4.0] * 3, "dcp_2": [3.0] * 3}
    return {"save": table_of("save", "Save", seconds, {"dcp_hf": "why"})}


def row(rows: list[dict[str, object]], words: str) -> dict[str, object]:
    (found,) = [row for row in rows if words in str(row["what"])]
    return found


@pytest.mark.parametrize("mine,verdict", [(1.0, "reached"), (1.01, "missed")])
def test_a_speed_is_the_others_seconds_over_ours(mine: float, verdict: str) -> None:
    rows = judge(saves([mine] * 3))
    assert rows[0]["target"] == "at least 0.9x"
    assert rows[0]["median"] == pytest.approx(0.9 / mine)
    assert rows[0]["verdict"] == verdict


def test_the_fastest_of_several_is_compared_with() -> None:
    found = row(judge(saves([1.0, 1.0, 1.5])), "best number of threads")
    assert found["measured"] == "3 (2 to 3)x"
    assert found["verdict"] == "reached"


def test_what_was_not_measured_is_said_to_be_so() -> None:
    assert row(judge(saves([1.0] * 3)), "Hugging Face")["measured"] == "not measured"
    assert {row["measured"] for row in judge({})} == {"not measured"}
    assert len(judge({})) == len(TARGETS)


def test_at_most_is_reached_from_below() -> None:
    tables = {"memory": table_of("memory", "Memory", {"shardpoint": [100.0, 110.0, 120.0]}, {}, unit="MB")}
    found = row(judge(tables), "extra memory")
    assert (found["measured"], found["verdict"]) == ("110 (100 to 120) MB", "reached")


def test_tables_have_the_contenders_names_and_promises() -> None:
    table = saves([1.0] * 3)["save"]
    assert table.labels["dcp_hf"] == ENTRIES["dcp_hf"].label
    assert table.notes["raw_direct"] == ENTRIES["raw_direct"].durability
    assert table.failures == {"dcp_hf": "why"}
