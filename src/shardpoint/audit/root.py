"""What a root's journal proves, all together."""

from __future__ import annotations

from shardpoint.audit.coverage import announced, coverage, gaps
from shardpoint.audit.overlaps import beside, overlaps
from shardpoint.audit.report import AuditReport, Finding, Speller
from shardpoint.journal import read_journal, timeline
from shardpoint.storage import Store


def audit_root(store: Store, against: Store | None = None) -> AuditReport:
    """Audit a root's journal.

    Args:
        store: the root.
        against: another root whose run should have done the same, for example one that nobody interrupted.

    Raises:
        NotFoundError: a root has no journal.
        UnsupportedFormatError: a journal of a newer version.
        StorageError: a journal cannot be read.
    """
    contents = read_journal(store)
    counting = timeline(contents.lives)
    spell = Speller(step.epoch for life in contents.lives for step in life.steps)
    report = AuditReport(contents.lives)
    report.comparisons += overlaps(contents.lives, spell)
    if against is not None:
        other = read_journal(against)
        report.comparisons += beside(timeline(other.lives), counting, against.location, spell)
    report.findings += [
        Finding("damaged", f"line {place} of the journal cannot be read: it was damaged") for place in contents.damaged
    ]
    report.findings += gaps(counting, spell)
    for finding in coverage(counting, spell):
        if isinstance(finding, Finding):
            report.findings.append(finding)
        else:
            report.notes.append(finding)
    report.findings += announced(store, counting, spell)
    report.notes += [f"line {place} of the journal was cut short when its life ended" for place in contents.torn]
    if counting and all(step.samples is None for step, _ in counting):
        report.notes.append("no step recorded its samples, so the data were not compared")
    for life in contents.lives:
        if life.life is None:
            report.notes.append(f"the first line of life {life.number} is lost: its ranks and its origin are not known")
        for passed in life.life.passed_over if life.life is not None else []:
            report.notes.append(f"life {life.number} passed over {passed.name}: {passed.reason}")
    return report
