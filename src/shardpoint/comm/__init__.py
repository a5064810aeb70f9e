"""How do the ranks of a job agree on one outcome? Import `Comm`, `SoloComm` and `in_process_comms` from here."""

from __future__ import annotations

from shardpoint.comm.in_process import InProcessComm, SoloComm, in_process_comms
from shardpoint.comm.protocol import Comm

__all__ = ["Comm", "InProcessComm", "SoloComm", "in_process_comms"]
