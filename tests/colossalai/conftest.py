"""These tests run where ColossalAI is, `make test-colossalai`: it wants older packages than the other tests have."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("colossalai") else ["*.py"]
