"""The result of lowering a conjunction of constraints on strings or numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from service.schema_compiler.normalize.constraints import Literal

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lowered(Generic[T]):
    """The values that satisfy a conjunction of literals.

    found: None where no value does. It never ignores a literal that is not in ``dropped``.
    dropped: literals that ``found`` does not enforce, each with the reason, in words for the caller
    ("is too large together with …").
    """

    found: T | None
    dropped: tuple[tuple[Literal, str], ...] = ()
