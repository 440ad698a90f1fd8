"""Numbers that satisfy keywords.

The truth is the validator, for which every number is the decimal that is written
(`service.schema_compiler.exact`).
"""

from __future__ import annotations

from collections.abc import Sequence

from service.schema_compiler.emit.rules import Rules
from service.schema_compiler.lower.decimals import decimals_expression
from service.schema_compiler.lower.integers import integers_expression
from service.schema_compiler.lower.number_constraints import Conditions, Unwritable
from service.schema_compiler.normalize.literals import Emitted, Literal


def emit_number(literals: Sequence[Literal], rules: Rules) -> Emitted:
    """The numbers that satisfy a conjunction of ``type`` (``integer``), bounds, ``multipleOf`` and
    values excluded by a negated ``enum``; each may come several times, and negated.

    Integers are written without a point where ``type`` asks for them. No number has more than some
    two hundred digits.
    """
    assert not any(isinstance(one.value, float) for one in literals)
    kept, dropped = list(literals), list[tuple[Literal, str]]()
    while True:
        try:
            return Emitted(_expression(Conditions.of(kept), rules), tuple(dropped))
        except Unwritable as error:
            dropped += [(source, error.reason) for source in error.literals]
            kept = [source for source in kept if source not in error.literals]


def _expression(conditions: Conditions, rules: Rules) -> str | None:
    if conditions.integers and conditions.broken:
        return None
    if conditions.integers:
        return integers_expression(conditions, rules)
    return decimals_expression(conditions, rules)
