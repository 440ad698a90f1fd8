"""Grammars over single bytes, so that every text can be tried."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from service.schema_compiler.emit.rules import Rules
from service.schema_compiler.normalize.literals import Emitted

if TYPE_CHECKING:
    import xgrammar

STOP = 256


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
