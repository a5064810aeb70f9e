"""Checkpoints of other libraries' formats: export to them, import from them."""
