"""Did a resumed run do again, bit for bit, what it had done before? Told from a root's journal, without torch.

Steps that two lives did are compared, and the first thing that differs is named. Beside that: is a step missing, was a
sample taken twice or never, and did what followed a checkpoint begin with the samples that it had said came next?
"""

from shardpoint.audit.report import AuditReport, Comparison, Difference, Finding
from shardpoint.audit.root import audit_root

__all__ = ["AuditReport", "Comparison", "Difference", "Finding", "audit_root"]
