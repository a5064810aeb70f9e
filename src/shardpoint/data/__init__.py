"""What feeds a training loop in an order that can be resumed: the samplers.

`StatefulDistributedSampler` is the only one. Its position names a sample of the whole job, not of a rank.
"""

from __future__ import annotations

from shardpoint.data.sampler import StatefulDistributedSampler

__all__ = ["StatefulDistributedSampler"]
