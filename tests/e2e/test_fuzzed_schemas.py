"""Schemas made by chance, and some made to do harm, against a server in a process of its own.

A small part of ``python -m benchmarks fuzzed_schemas``.
"""

from __future__ import annotations

import pytest

from benchmarks.fuzzed_schemas import SEEDS, attack, message
from benchmarks.schema_answers import server
from service.types import Grammar, GrammarKind
from tests.service.schema_compiler.fuzzed import fuzzed
from tests.service.schema_compiler.hostile import HOSTILE

FUZZED = 60
HOSTILE_ONES = HOSTILE[3::9]
GROWTH_MIB = 250
"""Caches fill and allocators keep what is free; a leak for each call would show."""


@pytest.mark.slow
async def test_nothing_ends_or_stalls_the_server() -> None:
    assert len(HOSTILE) >= 50
    grammars = [Grammar(GrammarKind.JSON_SCHEMA, text) for text in fuzzed(SEEDS, FUZZED, seed=7)]
    grammars += [one.grammar for one in HOSTILE_ONES]
    with server() as (process, address):
        found = await attack(address, process, grammars)
        assert process.poll() is None
    assert found.wrong() == []
    assert sum(found.reasons.values()) == len(grammars)
    assert found.reasons["OK"] >= 10
    assert found.reasons["GRAMMAR_COMPILE_CRASHED"] == 0
    assert len(found.probes) >= 10
    assert found.memory[-1] - found.memory[0] < GROWTH_MIB


def test_every_hostile_grammar_fits_a_message() -> None:
    for one in HOSTILE:
        assert message(one.grammar).WhichOneof("kind") == one.grammar.kind.value
