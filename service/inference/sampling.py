"""The ranges of the sampling options, for callers of every front end and of the library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from service.errors import FieldViolation, InvalidRequest


@dataclass(frozen=True, slots=True)
class Option:
    """A sampling option and the values that it takes.

    low, high: bounds, which belong to the range; ``above`` leaves out the lower one. high: None is
    no bound. allowed: the range in words.
    """

    name: str
    allowed: str
    low: float
    high: float | None = None
    whole: bool = False
    above: bool = False

    def fits(self, value: object) -> bool:
        """Whether the value is a finite number of the range, and whole where it has to be."""
        if not isinstance(value, (int if self.whole else (int, float))) or isinstance(value, bool):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        enough = value > self.low if self.above else value >= self.low
        return enough and (self.high is None or value <= self.high)


OPTIONS = (
    Option("temperature", "a finite number from 0 to 2", 0, 2),
    Option("top_p", "above 0 and at most 1", 0, 1, above=True),
    Option("top_k", "at least 1", 1, whole=True),
    Option("repetition_penalty", "above 0 and at most 10", 0, 10, above=True),
    Option("seed", "a 64-bit unsigned integer", 0, 2**64 - 1, whole=True),
    Option("max_tokens", "at least 1", 1, whole=True),
)
"""One row for each field of ``Sampling``. ``top_k`` is 0 there when nobody set it."""


def violations(given: Mapping[str, object]) -> Iterator[FieldViolation]:
    """The options out of range among those that were set."""
    for option in OPTIONS:
        if option.name in given and not option.fits(given[option.name]):
            yield FieldViolation(
                f"sampling.{option.name}", f"must be {option.allowed}, not {given[option.name]}"
            )


def refuse(found: Sequence[FieldViolation]) -> None:
    """Raise ``InvalidRequest`` with all violations, if there are any."""
    if found:
        first, *rest = found
        raise InvalidRequest(
            first.field, first.description, reason="SAMPLING_OPTION_INVALID", more=tuple(rest)
        )
