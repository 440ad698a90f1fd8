"""The constraints on one string, by kinds of keywords."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from service.schema_compiler.lower.format_patterns import FORMAT_PATTERNS
from service.schema_compiler.normalize.constraints import PREFIX, Literal

MAX_COUNTED = 64
"""Characters up to which a grammar counts. Each is a state, for which a compiler goes through all
tokens: about 20 ms where there are 150,000."""
TOO_LONG = f"counts to more than {MAX_COUNTED} characters, which a grammar does not"
"""Why a bound of a length is dropped."""


@dataclass(slots=True)
class StringConstraints:
    """A conjunction of literals, by kind. uncounted: keywords of lengths that the decoder counts."""

    uncounted: frozenset[str] = frozenset()
    low: int = 0
    high: int | None = None
    lows: list[Literal] = field(default_factory=list)
    highs: list[Literal] = field(default_factory=list)
    patterns: list[tuple[Literal, str]] = field(default_factory=list)
    excluded: list[Literal] = field(default_factory=list)
    """Texts, and prefixes of texts, that are not constraints."""
    prefix: str = ""
    """The text begins with it, and is longer."""
    dropped: list[tuple[Literal, str]] = field(default_factory=list)

    def add(self, one: Literal) -> None:
        """Sort a literal in."""
        if one.keyword in ("minLength", "maxLength"):
            self._bound(one, int(one.value), is_low=(one.keyword == "minLength") != one.negated)
        elif one.keyword == "pattern":
            self.patterns.append((one, one.value))
        elif one.keyword == "format":
            self._format(one)
        elif one.keyword in ("enum", PREFIX) and one.negated:
            self.excluded.append(one)
        elif one.keyword == PREFIX:
            self.prefix = one.value
        else:
            self.dropped.append((one, "is not part of a grammar"))

    def _format(self, one: Literal) -> None:
        known = FORMAT_PATTERNS.get(one.value)
        if known is None:
            self.dropped.append((one, "is a format that no grammar can express"))
            return
        is_left = "format" in self.uncounted and known.uncounted
        pattern = known.excluded if one.negated else known.uncounted if is_left else known.pattern
        if pattern is None:
            self.dropped.append((one, "is a format that a grammar cannot exclude"))
        else:
            self.patterns.append((one, pattern))

    def _bound(self, one: Literal, bound: int, *, is_low: bool) -> None:
        if is_low:
            self.low = max(self.low, bound + one.negated)
            self.lows.append(one)
        else:
            self.high = min(bound - one.negated, bound if self.high is None else self.high)
            self.highs.append(one)

    def countable(self) -> tuple[int, int | None]:
        """The bounds that a grammar can count to; the others are dropped."""
        low = 0 if "minLength" in self.uncounted else self.low
        high = None if "maxLength" in self.uncounted else self.high
        if low > MAX_COUNTED:
            low = 0
            self.drop(self.lows, TOO_LONG)
        if high is not None and high > MAX_COUNTED:
            high = None
            self.drop(self.highs, TOO_LONG)
        return low, high

    def drop(self, literals: Iterable[Literal], why: str) -> None:
        """Literals that the grammar does not enforce."""
        self.dropped += [(one, why) for one in literals]
