"""What a string has to satisfy, sorted by kinds of keywords."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from service.schema_compiler.emit.free_strings import COUNTED
from service.schema_compiler.lower.format_patterns import FORMAT_PATTERNS
from service.schema_compiler.normalize.literals import BEGINNING, Literal

COUNTS = f"counts to more than {COUNTED} characters, which a grammar does not"
"""Why a bound of a length is dropped."""


@dataclass(slots=True)
class Wanted:
    """A conjunction, by kinds of literals."""

    low: int = 0
    high: int | None = None
    lows: list[Literal] = field(default_factory=list)
    highs: list[Literal] = field(default_factory=list)
    patterns: list[tuple[Literal, str]] = field(default_factory=list)
    excluded: list[Literal] = field(default_factory=list)
    """Texts, and beginnings of texts, that are not wanted."""
    beginning: str = ""
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
        elif one.keyword in ("enum", BEGINNING) and one.negated:
            self.excluded.append(one)
        elif one.keyword == BEGINNING:
            self.beginning = one.value
        else:
            self.dropped.append((one, "is not part of a grammar"))

    def _format(self, one: Literal) -> None:
        known = FORMAT_PATTERNS.get(one.value)
        if known is None:
            self.dropped.append((one, "is a format that no grammar can express"))
        elif one.negated and not known.exact:
            self.dropped.append((one, "is a format that a grammar cannot exclude"))
        else:
            self.patterns.append((one, known.pattern))

    def _bound(self, one: Literal, bound: int, *, is_low: bool) -> None:
        if is_low:
            self.low = max(self.low, bound + one.negated)
            self.lows.append(one)
        else:
            self.high = min(bound - one.negated, bound if self.high is None else self.high)
            self.highs.append(one)

    def countable(self) -> tuple[int, int | None]:
        """The bounds that a grammar can count to; the others are dropped."""
        low, high = self.low, self.high
        if low > COUNTED:
            low = 0
            self.drop(self.lows, COUNTS)
        if high is not None and high > COUNTED:
            high = None
            self.drop(self.highs, COUNTS)
        return low, high

    def drop(self, literals: Iterable[Literal], why: str) -> None:
        """Literals that the grammar does not enforce."""
        self.dropped += [(one, why) for one in literals]
