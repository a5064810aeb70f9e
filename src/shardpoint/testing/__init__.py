"""What proves a store, or breaks one on purpose: for the tests of Shardpoint and of whoever builds on it."""

from shardpoint.testing.faults import Fault, FaultyStore
from shardpoint.testing.store_tests import StoreTests

__all__ = ["Fault", "FaultyStore", "StoreTests"]
