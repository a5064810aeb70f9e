from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.planning import plan_files, PartNaming
from shardpoint.planning.chunks import BLOCK_BYTES, plan_chunks
from shardpoint.planning.ownership import owned_items
from tests.property import drawn
