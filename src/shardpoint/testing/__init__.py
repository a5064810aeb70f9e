"""What proves a store, breaks one on purpose, or plays a large job: for our tests, and those of who builds on it."""

from shardpoint.testing.faults import Fault, FaultyStore
from shardpoint.testing.simulator import Simulation, VirtualTensor, llama3_405b, transformer_tensors
from shardpoint.testing.store_tests import StoreTests

__all__ = [
    "Fault",
    "FaultyStore",
    "Simulation",
    "StoreTests",
    "VirtualTensor",
    "llama3_405b",
    "transformer_tensors",
]
