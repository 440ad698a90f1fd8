"""What a case is, and what it measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

HEALTH_P99_MS = 100.0


@dataclass(frozen=True)
class Value:
    """One figure of a case. bound: None where there is nothing to meet, only something to know."""

    what: str
    measured: float
    unit: str = ""
    bound: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool:
        if self.bound is None:
            return True
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    @property
    def wanted(self) -> str:
        if self.bound is None:
            return "-"
        return f"{'≥' if self.at_least else '≤'} {self.bound:g} {self.unit}".strip()

    def row(self) -> dict[str, Any]:
        shown = f"{self.measured:.3g}" if self.measured < 1000 else f"{self.measured:.0f}"
        return {
            "what": self.what,
            "wanted": self.wanted,
            "measured": f"{shown} {self.unit}".strip(),
            "met": "-" if self.bound is None else ("yes" if self.met else "**no**"),
        }


@dataclass(frozen=True)
class Case:
    """One attack or fault.

    does: what the attacker does, or what goes wrong. before: what was seen before the server was
    hardened. run: takes whether to be short, returns the figures.
    """

    name: str
    does: str
    before: str
    run: Callable[[bool], Iterable[Value]]


CASES: dict[str, Case] = {}


def case(name: str, does: str, before: str) -> Callable[[Any], Any]:
    """Register a function as a case."""

    def register(run: Callable[[bool], Iterable[Value]]) -> Callable[[bool], Iterable[Value]]:
        CASES[name] = Case(name, does, before, run)
        return run

    return register


def health(probe: Any) -> Value:
    """The health checks beside an attack."""
    return Value("health check, p99", probe.percentile_ms(99), "ms", HEALTH_P99_MS)


def true(what: str, found: bool) -> Value:
    """Something that has to hold: 1 is yes."""
    return Value(what, float(found), "", 1, at_least=True)


def share(what: str, found: int, of: int) -> Value:
    """So many of so many calls, and all are wanted."""
    return Value(f"{what}, of {of}", found, "", of, at_least=True)
