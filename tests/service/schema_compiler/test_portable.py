"""Classes of callers' EBNF mean the same after they are written anew."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.schema_compiler.emit.portable import portable
from tests.service.schema_compiler.schemas import accepts, compiled

CHARACTERS = '\n\0"#-A[\\]^azé߿ࠀ一鿿龥\ud7ff\ue000\uffee\U0001f600\U0010ffff'
units = st.sampled_from(
    [
        *'aé-#"^z一龥😀[',
        r"\]",
        r"\-",
        r"\\",
        r"\n",
        r"\"",
        r"\x41",
        r"\xe9",
        r"\u9fa5",
        r"\U0001f600",
    ]
)
members = units | st.tuples(units, units).map("-".join)
bodies = st.lists(members, min_size=1, max_size=3).map("".join)


@settings(max_examples=40)
@given(st.sampled_from(("", "^")), bodies)
def test_classes_mean_the_same(negated: str, body: str) -> None:
    source = f'root ::= "[é" [{negated}{body}] # [é\n'
    try:
        before = compiled(source)
    except RuntimeError:  # bounds in the wrong order
        assert portable(source) == source
        return
    after = compiled(portable(source))
    for character in CHARACTERS:
        assert accepts(before, "[é" + character) == accepts(after, "[é" + character), character


@pytest.mark.parametrize(
    "source",
    [
        r'root ::= "[^a\"]" [a-z\]] # [^b]',
        r"root ::= [\d-é]",
        "root ::= [é-a]",
        "root ::= [é",
        "root ::= []",
    ],
)
def test_the_rest_stays_as_it_is(source: str) -> None:
    assert portable(source) == source


def test_ranges_are_cut() -> None:
    assert portable("root ::= [一-龥]+") == (
        r"root ::= [\U00004e00-\U00008fff\U00009000-\U00009fa5]+"
    )
    assert portable("root ::= [^\\x00-z]").startswith(r"root ::= [\U0000007b-\U0000007f\U00000080-")
