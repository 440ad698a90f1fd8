"""Values that a schema lists, with the members of their objects in any order where that is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from service.schema_compiler.exact import text_of
from service.schema_compiler.ir.values import (
    Alternative,
    AnyOrder,
    Array,
    Constant,
    Object,
    Property,
    PropertyValue,
)
from service.schema_compiler.lower.context import Context

AS_LISTED = (
    "members of objects that are listed as values in the listed order: these are too large together"
)
ITEMS_AS_LISTED = "members of objects in the listed order"
_FRACTION_DIGITS = 30


def constants(
    context: Context, values: Iterable[Any], pointers: Iterable[str]
) -> list[Alternative]:
    """The alternatives of listed values. pointers: of the keywords that list them."""
    found: list[Alternative] = []
    for value in values:
        states = 0 if context.order_rules is None else states_of(value)
        if states and not context.affords_order(states, free=0):
            for pointer in pointers:
                context.remark(pointer, AS_LISTED)
            states = 0
        found += in_any_order(context, value) if states else _texts(value)
    return found


def in_any_order(context: Context, value: Any) -> list[Alternative]:
    """The alternatives of a value that is listed, whose objects have their members in any order."""
    if not states_of(value):
        return _texts(value)
    if isinstance(value, list):
        return [Array(tuple(map(context.constant, value)), None, len(value), len(value))]
    order = AnyOrder(True, len(value), (tuple(value),))
    properties = tuple(
        Property(name, True, (PropertyValue(context.constant(member)),))
        for name, member in value.items()
    )
    return [Object(properties, (), any_order=order)]


def states_of(value: Any) -> int:
    """How many sets of members the objects of a value have, in which members can have come; 0 where
    there is one order."""
    if isinstance(value, list):
        return sum(map(states_of, value))
    if not isinstance(value, dict):
        return 0
    inside = sum(map(states_of, value.values()))
    return inside + (1 << len(value)) if inside or len(value) > 1 else 0


def _texts(value: Any) -> list[Alternative]:
    """The value as ``json.dumps`` writes it; a fraction as in the schema, too."""
    texts = [text_of(value)]
    if isinstance(value, Decimal) and abs(value.adjusted()) < _FRACTION_DIGITS:
        plain = f"{value:f}"
        if "." in plain and plain != texts[0]:
            texts.append(plain)
    return [*map(Constant, texts)]
