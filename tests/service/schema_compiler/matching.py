"""Grammars over single bytes, so that every text can be tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from service.schema_compiler.emit.numbers import number
from service.schema_compiler.emit.rules import Rules
from service.schema_compiler.emit.strings import raw_text, string
from service.schema_compiler.lower.lowered import Lowered
from service.schema_compiler.lower.numbers import lower_number
from service.schema_compiler.lower.strings import lower_regex, lower_string
from service.schema_compiler.normalize.constraints import Literal

if TYPE_CHECKING:
    import xgrammar

STOP = 256
T = TypeVar("T")


@dataclass(frozen=True)
class Emitted:
    """The expression for the values of a conjunction; None where there is none. dropped: literals that
    it does not enforce, each with the reason."""

    expression: str | None
    dropped: tuple[tuple[Literal, str], ...] = ()


def emit_string(literals: Iterable[Literal], rules: Rules, *, name: bool = False) -> Emitted:
    return _emitted(lower_string(literals)[0], lambda texts: string(texts, rules, name=name))


def emit_number(literals: Sequence[Literal], rules: Rules) -> Emitted:
    return _emitted(lower_number(literals), lambda numbers: number(numbers, rules))


def emit_regex(source: str, rules: Rules) -> Emitted:
    return _emitted(lower_regex(source), lambda texts: raw_text(texts, rules))


def _emitted(lowered: Lowered[T], emit: Callable[[T], str]) -> Emitted:
    return Emitted(None if lowered.found is None else emit(lowered.found), lowered.dropped)


@lru_cache(maxsize=1)
def _compiler() -> xgrammar.GrammarCompiler:
    import xgrammar

    table = [*(bytes([value]) for value in range(256)), b"<stop>"]
    info = xgrammar.TokenizerInfo(table, xgrammar.VocabType.RAW, stop_token_ids=[STOP])
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def compiled(emitted: Emitted, rules: Rules) -> xgrammar.CompiledGrammar | None:
    """The grammar of an expression; None where nothing satisfies it."""
    if emitted.expression is None:
        return None
    return _compiler().compile_grammar(rules.text(emitted.expression))


def accepts(grammar: xgrammar.CompiledGrammar | None, text: str | bytes) -> bool:
    """Whether a grammar accepts a text and lets it end there."""
    import xgrammar

    if grammar is None:
        return False
    matcher = xgrammar.GrammarMatcher(grammar)
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return all(matcher.accept_token(byte) for byte in data) and matcher.accept_token(STOP)
