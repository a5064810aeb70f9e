"""What a load is allowed to differ in: names by pattern, and dtypes of weights; nothing unless it is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from shardpoint.errors import UsageError

_REALS = frozenset({"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_COMPLEX = frozenset({"C128", "C64", "C32"})


@dataclass(frozen=True, slots=True)
class Allowances:
    """What may differ between a checkpoint and a target.

    Attributes:
        missing: patterns (`fnmatch`, case-sensitive) of the FQNs that the checkpoint may lack.
        unexpected: patterns of the FQNs that the target may lack.
        cast: whether weights may have another floating-point dtype, or another complex one.
        widen: whether weights may be float32 where 16 bits are stored, which loses nothing.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: bool = False
    widen: bool = False

    @classmethod
    def of(cls, missing: Collection[str], unexpected: Collection[str], *, cast: bool) -> Allowances:
        """Return what a caller's arguments allow.

        Raises:
            UsageError: patterns that are no list of strings.
        """
        for name, patterns in (("allow_missing", missing), ("allow_unexpected", unexpected)):
            if isinstance(patterns, str) or not all(isinstance(item, str) for item in patterns):
                text = f'{name}={patterns!r}: give a list of patterns of parameters\' names, as ["lm_head.*"]'
                raise UsageError(text)
        return cls(tuple(missing), tuple(unexpected), cast)

    def may_miss(self, fqn: str) -> bool:
        """Tell whether the checkpoint may lack what a parameter or buffer of this name needs."""
        return any(fnmatchcase(fqn, pattern) for pattern in self.missing)

    def may_leave(self, fqn: str) -> bool:
        """Tell whether the target may lack a parameter or buffer of this name."""
        return any(fnmatchcase(fqn, pattern) for pattern in self.unexpected)

    def may_cast(self, stored: str, wanted: str) -> bool:
        """Tell whether one dtype may be converted into the other: between floating-point dtypes, or complex ones."""
        if self.widen and wanted == "F32" and stored in {"BF16", "F16"}:
            return True
        return self.cast and any({stored, wanted} <= kind for kind in (_REALS, _COMPLEX))

    def idle(self, target: Iterable[str], stored: Iterable[str]) -> list[str]:
        """Return the patterns that no name matches: of the target, or of the checkpoint; each may be a typo."""
        wanted, had = set(target), set(stored)
        idle = [
            f"allow_missing pattern {pattern!r} matches no name of the target"
            for pattern in self.missing
            if not any(fnmatchcase(name, pattern) for name in wanted)
        ]
        return idle + [
            f"allow_unexpected pattern {pattern!r} matches no name of the checkpoint"
            for pattern in self.unexpected
            if not any(fnmatchcase(name, pattern) for name in had)
        ]
