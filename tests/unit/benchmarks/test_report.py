from __future__ import annotations

import json

from benchmarks.report import Summary, Table, as_json, as_markdown, best, ratios, short, table_markdown

FACTS = {
    "date": "a day",
    "commit": "abc",
    "machine": {"cores": "2"},
    "options": {"rounds": "3"},
    "versions": {"torch": "2.13.0"},
}


def table() -> Table:
    return Table(
        "save",
        "Durable save",
        "s",
        {"raw": [1.0, 2.0, 4.0], "mine": [2.0, 2.0, 2.0], "other": [4.0, 8.0, 6.0]},
        {"raw": "raw limit", "mine": "mine", "other": "other", "gone": "gone"},
        reference="raw",
        num_bytes=4_000_000_000,
        notes={"mine": "its own | fsync"},
        failures={"gone": "it raised"},
    )


def test_ratios_are_of_the_same_round() -> None:
    assert ratios(table(), "mine", "raw") == [2.0, 1.0, 0.5]
    assert Summary.of(ratios(table(), "mine", "raw")) == Summary(1.0, 0.5, 2.0)


def test_the_best_has_the_lowest_median() -> None:
    assert best(table(), ["other", "raw"]) == "raw"
    assert best(table(), ["other", "nobody"]) == "other"
    assert best(table(), ["nobody"]) is None


def test_numbers_have_three_digits() -> None:
    assert [short(number) for number in (0.00123, 0.5, 1.0, 12.345, 99.96, 123.4, 5678.9)] == [
        "0.00123",
        "0.5",
        "1",
        "12.3",
        "100",
        "123",
        "5679",
    ]


def test_a_table_in_markdown() -> None:
    assert table_markdown(table()).splitlines() == [
        "| what | seconds | GB/s | times raw limit | durable by |",
        "| --- | --- | --- | --- | --- |",
        "| raw limit | 2 (1 to 4) | 2 | 1 |  |",
        "| mine | 2 | 2 | 1 (0.5 to 2) | its own \\| fsync |",
        "| other | 6 (4 to 8) | 0.667 | 4 (1.5 to 4) |  |",
    ]


def test_a_table_without_a_reference_has_no_ratios() -> None:
    plain = Table("memory", "Memory", "MB", {"mine": [3.0]}, {"mine": "mine"})
    assert table_markdown(plain) == "| what | MB |\n| --- | --- |\n| mine | 3 |"
    gone = table()
    del gone.measurements["raw"]
    assert "times" not in table_markdown(gone)


def test_the_report_says_who_was_left_out_and_why() -> None:
    text = as_markdown([table()], FACTS, [])
    assert "Left out: gone: it raised" in text
    assert "cores: 2" in text
    assert "torch 2.13.0" in text


def test_the_json_has_all_seconds_medians_and_ratios() -> None:
    document = json.loads(json.dumps(as_json([table()], FACTS, [])))
    (case,) = document["cases"]
    assert case["measurements"]["raw"] == [1.0, 2.0, 4.0]
    assert case["medians"] == {"raw": 2.0, "mine": 2.0, "other": 6.0}
    assert case["ratios"]["mine"] == {"median": 1.0, "lowest": 0.5, "highest": 2.0}
    assert document["commit"] == "abc"
