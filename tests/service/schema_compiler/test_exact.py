"""Exact decimals against fractions of the standard library."""

from __future__ import annotations

import json
import math
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.schema_compiler.exact import (
    MAX_DIGITS,
    Number,
    UnreadableNumber,
    is_multiple,
    is_whole,
    parts,
    read,
    text_of,
    units,
)

_NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30),
    st.builds(
        lambda digits, exponent: Decimal(digits).scaleb(exponent),
        st.integers(-(10**12), 10**12),
        st.integers(-40, 40),
    ),
)
_STEPS = st.one_of(
    st.sampled_from(
        [1, 3, 7, 10, 250, *map(Decimal, ("0.01", "0.1", "0.05", "2.5", "3.0", "1E+3"))]
    ),
    _NUMBERS.map(lambda value: value if isinstance(value, int) else value.copy_abs()).filter(
        lambda value: value > 0
    ),
)


@given(_NUMBERS, _STEPS, st.integers(-5, 5))
def test_multiples(value: Number, step: Number, factor: int) -> None:
    assert is_multiple(value, step) == ((Fraction(value) / Fraction(step)).denominator == 1)
    if isinstance(step, int):
        assert is_multiple(step * factor, step)


@given(_NUMBERS)
def test_whole_numbers(value: Number) -> None:
    assert is_whole(value) == (Fraction(value).denominator == 1)


@given(_NUMBERS)
def test_parts(value: Number) -> None:
    digits, exponent = parts(value)
    assert digits * Fraction(10) ** exponent == abs(Fraction(value))
    assert digits % 10 or digits == exponent == 0


@given(_NUMBERS, st.integers(0, 12))
def test_units(value: Number, places: int) -> None:
    scaled = Fraction(value) * 10**places
    assert units(value, places, up=True) == math.ceil(scaled)
    assert units(value, places, up=False) == math.floor(scaled)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_read_as_they_are_written(value: float) -> None:
    text = json.dumps(value)
    assert Fraction(read(text)) == Fraction(text)
    assert text_of(read(text)) == text


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 9))
def test_what_no_float_stands_for_keeps_its_digits(value: float, digit: int) -> None:
    text = f"{value:.25f}{digit}1"
    assert Fraction(text_of(read(text))) == Fraction(text)


def test_values_are_written_as_json_is() -> None:
    value = {"a\u2028": [Decimal("1.50"), 1, True, None, "é"], "b": {}}
    assert text_of(value) == '{"a\u2028": [1.5, 1, true, null, "é"], "b": {}}'


@pytest.mark.parametrize(
    ("value", "step", "found"),
    [
        ("1e999999999", "0.01", True),
        ("1e999999999", "7", False),
        ("7e999999999", "7e-999999999", True),
        ("1e-999999999", "0.01", False),
        ("-0.0e9999999999999999999", "3", True),
        ("9" * (MAX_DIGITS - 2) + ".0", "9" * (MAX_DIGITS // 2) + "e1", False),
        ("1e9999999999999999", "9" * 4000 + ".5", False),
    ],
)
def test_exponents_and_digits_cost_no_time(value: str, step: str, found: bool) -> None:
    began = time.process_time()
    assert is_multiple(read(value), read(step)) is found
    is_whole(read(value))
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize("text", ["1." + "0" * MAX_DIGITS, "1e-" + "9" * 17, "1e-" + "9" * 99])
def test_what_cannot_be_compared_is_not_read(text: str) -> None:
    with pytest.raises(UnreadableNumber, match=r"^a number "):
        read(text)


_JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.text(),
        st.builds(Decimal, st.integers(-(10**6), 10**6)),
        st.integers(-(10**6), 10**6).map(lambda value: Decimal(value).scaleb(-3)),
    ),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_JSON)
def test_text_of_values_is_read_as_the_same_value(value: object) -> None:
    for compact in (False, True):
        text = text_of(value, compact=compact)
        assert json.loads(text, parse_float=Decimal) == value
    if "Decimal" not in repr(value):
        assert text_of(value) == json.dumps(value, ensure_ascii=False)
        compact_text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        assert text_of(value, compact=True) == compact_text
