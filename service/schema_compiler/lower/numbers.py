"""Numbers that satisfy keywords.

The validator decides what is right: for it every number is the decimal that is written
(`service.schema_compiler.exact`).
"""

from __future__ import annotations

from collections.abc import Sequence

from service.schema_compiler.ir.values import NumberSet
from service.schema_compiler.lower.decimals import decimals
from service.schema_compiler.lower.integers import integers
from service.schema_compiler.lower.lowered import Lowered
from service.schema_compiler.lower.number_constraints import NumberConstraints, Unwritable
from service.schema_compiler.normalize.constraints import Literal


def lower_number(literals: Sequence[Literal]) -> Lowered[NumberSet]:
    """The numbers that satisfy a conjunction of ``type`` (``integer``), bounds, ``multipleOf`` and
    values excluded by a negated ``enum``; each may come several times, and negated.

    Integers are written without a point where ``type`` asks for them. No number has more than some
    two hundred digits.
    """
    assert not any(isinstance(one.value, float) for one in literals)
    kept, dropped = list(literals), list[tuple[Literal, str]]()
    while True:
        try:
            return Lowered(_numbers(NumberConstraints.of(kept)), tuple(dropped))
        except Unwritable as error:
            dropped += [(source, error.reason) for source in error.literals]
            kept = [source for source in kept if source not in error.literals]


def _numbers(constraints: NumberConstraints) -> NumberSet | None:
    if constraints.integers and constraints.broken:
        return None
    return integers(constraints) if constraints.integers else decimals(constraints)
