"""Compiled grammars of an engine: what is equal, what is kept, and how many wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from prometheus_client import REGISTRY

from service.engines.common import grammar as grammar_module
from service.engines.common.grammar import GrammarCache
from service.errors import EngineUnavailable, GrammarError, InternalError, Overloaded
from service.types import Grammar, GrammarKind
from tests.service.analysed import analysed


@dataclass
class Compiled:
    grammar: Grammar
    size_bytes: int


class Compiler:
    """Takes note of what it is asked for; goes on when it is let."""

    def __init__(self, size_bytes: int = 100) -> None:
        self.seen: list[Grammar] = []
        self.size_bytes = size_bytes
        self.let = threading.Event()
        self.let.set()

    def compile(self, grammar: Grammar) -> Compiled:
        self.seen.append(grammar)
        assert self.let.wait(10)
        if "refused" in grammar.ebnf:
            raise GrammarError("grammar", "no")
        return Compiled(grammar, self.size_bytes)


def count(name: str) -> float:
    found = REGISTRY.get_sample_value(f"qwen3vl_grammar_cache_{name}_total", {"cache": "engine"})
    return found or 0.0


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def cache(compiler: Compiler) -> Iterator[GrammarCache[Compiled]]:
    made = GrammarCache(compiler, 250, 1)
    yield made
    compiler.let.set()
    made.close()


def one(number: int) -> Grammar:
    return analysed(GrammarKind.CHOICE, [str(number)])


async def test_grammars_with_equal_ebnf_share_one_entry(
    cache: GrammarCache[Compiled], compiler: Compiler
) -> None:
    hits, misses = count("hits"), count("misses")
    tight = analysed(GrammarKind.JSON_SCHEMA, '{"type":"boolean"}')
    loose = analysed(GrammarKind.JSON_SCHEMA, '{ "type": ["boolean"], "title": "b" }')
    assert tight.source != loose.source
    assert await cache.get(tight) is await cache.get(loose)
    assert len(compiler.seen) == 1
    assert (count("hits"), count("misses")) == (hits + 1, misses + 1)


async def test_the_same_ebnf_for_json_and_text_has_two_entries(
    cache: GrammarCache[Compiled], compiler: Compiler
) -> None:
    """Masks of JSON have no control characters."""
    schema = analysed(GrammarKind.JSON_SCHEMA, '{"type": "boolean"}')
    await cache.get(schema)
    await cache.get(replace(schema, kind=GrammarKind.EBNF))
    await cache.get(replace(schema, forces_little=not schema.forces_little))
    assert len(compiler.seen) == 3


async def test_concurrent_callers_share_one_compilation(
    cache: GrammarCache[Compiled], compiler: Compiler
) -> None:
    compiler.let.clear()
    gone, *others = [asyncio.ensure_future(cache.get(one(1))) for _ in range(5)]
    await asyncio.sleep(0.01)
    gone.cancel()
    compiler.let.set()
    assert len({id(found) for found in await asyncio.gather(*others)}) == 1
    assert len(compiler.seen) == 1


async def test_the_least_recently_used_is_evicted_and_errors_are_not_cached(
    cache: GrammarCache[Compiled], compiler: Compiler
) -> None:
    evictions = count("evictions")
    for number in (1, 2, 1, 3, 1, 2):
        await cache.get(one(number))
        assert cache.size_bytes <= 250
    assert [grammar.source for grammar in compiler.seen] == ['["1"]', '["2"]', '["3"]', '["2"]']
    assert count("evictions") == evictions + 2
    for _ in range(2):
        with pytest.raises(GrammarError):
            await cache.get(Grammar(GrammarKind.EBNF, "", "root ::= refused"))
    assert len(compiler.seen) == 6
    compiler.size_bytes = 251
    await cache.get(one(9))
    await cache.get(one(9))
    assert len(compiler.seen) == 8, "larger than the cache"


@pytest.mark.parametrize(("size", "kept"), [(125, 2), (126, 1), (250, 1), (251, 0)])
async def test_the_cache_may_be_filled_to_its_limit(
    cache: GrammarCache[Compiled], compiler: Compiler, size: int, kept: int
) -> None:
    compiler.size_bytes = size
    for number in (1, 2):
        await cache.get(one(number))
    assert cache.size_bytes == kept * size
    hits = count("hits")
    await cache.get(one(2))
    if kept == 2:
        await cache.get(one(1))
    assert count("hits") == hits + kept


async def test_too_many_waiting_grammars_are_refused(
    cache: GrammarCache[Compiled], compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "MAX_RUNNING", 2)
    compiler.let.clear()
    waiting = [asyncio.ensure_future(cache.get(one(number))) for number in range(2)]
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded):
        await cache.get(one(2))
    same = asyncio.ensure_future(cache.get(one(1)))
    compiler.let.set()
    await asyncio.gather(*waiting, same)
    await cache.get(one(2))


async def test_unanalysed_grammars_and_a_closed_cache_are_errors(
    cache: GrammarCache[Compiled], compiler: Compiler
) -> None:
    with pytest.raises(InternalError, match="not analysed"):
        await cache.get(Grammar(GrammarKind.CHOICE, '["a"]'))
    assert compiler.seen == []
    cache.close()
    with pytest.raises(EngineUnavailable):
        await cache.get(one(1))
