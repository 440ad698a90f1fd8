"""The ranges of the sampling options, for every front end and for use as a library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from service.errors import FieldViolation, InvalidRequest


@dataclass(frozen=True, slots=True)
class Option:
    """A sampling option and its allowed values.

    low, high: inclusive bounds; with ``above``, the lower bound is exclusive. A ``high`` of None
        means no bound.
    allowed: the range in words.
    """

    name: str
    allowed: str
    low: float
    high: float | None = None
    whole: bool = False
    above: bool = False

    def fits(self, value: object) -> bool:
        """Whether the value is a finite number in the range, and an integer where the option needs
        one."""
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
"""One row for each numeric field of ``Sampling``. A ``top_k`` that was not set is 0 in ``Sampling``."""


def violations(given: Mapping[str, object]) -> Iterator[FieldViolation]:
    """The violations of the options that were set and are out of range."""
    for option in OPTIONS:
        if option.name in given and not option.fits(given[option.name]):
            yield FieldViolation(
                f"sampling.{option.name}", f"must be {option.allowed}, not {given[option.name]}"
            )


def refuse(found: Sequence[FieldViolation]) -> None:
    """Raise ``InvalidRequest`` with all violations, if any."""
    if found:
        first, *rest = found
        raise InvalidRequest(
            first.field, first.description, reason="SAMPLING_OPTION_INVALID", more=tuple(rest)
        )
