"""When to save, and which committed checkpoints to keep. Import what it offers from here.

Policies are small frozen values that decide from plain facts; they read no file and no clock, and know no rank. A
training loop lists them: `Checkpointer(root, save=[Every(steps=500)], keep=[Latest(3)])`.
"""

from shardpoint.policies.cadence import At, Every, OnPreemption, SavePolicy, fits, preemption_of, save_is_due
from shardpoint.policies.retention import (
    Best,
    Committed,
    EveryNth,
    KeepPolicy,
    Latest,
    NewerThan,
    Pinned,
    names_to_keep,
)

__all__ = [
    "At",
    "Best",
    "Committed",
    "Every",
    "EveryNth",
    "KeepPolicy",
    "Latest",
    "NewerThan",
    "OnPreemption",
    "Pinned",
    "SavePolicy",
    "fits",
    "names_to_keep",
    "preemption_of",
    "save_is_due",
]
