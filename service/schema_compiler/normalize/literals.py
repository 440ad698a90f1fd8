"""Single constraints, and how languages of strings and numbers are asked for.

The seam between the expansion of schemas, which knows no characters, and the modules that write
strings and numbers, which know no schemas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BEGINNING = "beginning"
"""No keyword of JSON Schema, for names of members alone. Its value is a text with which a name begins
that is longer; with ``negated``, a list of texts with none of which a name begins."""


@dataclass(frozen=True, slots=True, eq=False)
class Literal:
    """One keyword that a value has to satisfy, or with ``negated`` to violate.

    Draft differences are gone: ``exclusiveMinimum`` and ``exclusiveMaximum`` are numbers, ``const``
    is an ``enum`` of one value.
    value: as in the schema. pointer: of the keyword, in the schema as sent; empty where no keyword
    of the caller stands behind it, such as names of properties that are declared beside.
    """

    keyword: str
    value: Any
    pointer: str = ""
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Emitted:
    """An expression of EBNF for the values that satisfy a conjunction of literals.

    expression: None where no value does. Never misses a constraint that is not in ``dropped``; every
    text that it matches is JSON.
    dropped: literals that the expression does not enforce, each with the reason, in words for the
    caller ("is too large together with …").
    """

    expression: str | None
    dropped: tuple[tuple[Literal, str], ...] = ()
