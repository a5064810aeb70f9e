"""What feeds a training loop in an order that can be resumed: the sampler, and loaders that draw nothing.

The position of `StatefulDistributedSampler` names a sample of the whole job, not of a rank.
"""

from __future__ import annotations

from shardpoint.data.loading import with_own_generator
from shardpoint.data.sampler import StatefulDistributedSampler

__all__ = ["StatefulDistributedSampler", "with_own_generator"]
