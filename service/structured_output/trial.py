"""Tests a grammar over a vocabulary of single bytes: it compiles, accepts some text, and is fast to
match.

The test runs in a process that may crash or be killed, before an engine compiles the same EBNF over
its own vocabulary.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmdeploy_ext.grammars.light import import_xgrammar
from service.compile_errors import refusal, too_costly
from service.errors import GrammarError
from service.types import Grammar, GrammarKind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WALK_BYTES = 2000
STEP_LIMIT_S = 0.05
"""Maximum processor time to match one byte, in seconds; ordinary grammars need microseconds."""
WALK_LIMIT_S = 0.5
"""Maximum processor time to match a whole text, in seconds."""
MAX_BYTES = 16 << 20
"""Maximum memory of a grammar that is compiled over single bytes. Over a real vocabulary, the
compiled grammar takes several times as much."""
_STOP = 256
_FIRST_PRINTABLE = 0x20


class Trial:
    """Compiles and tests grammars over bytes. light: replace torch and transformers by stubs; only
    for a process that never needs them."""

    def __init__(self, *, light: bool) -> None:
        if light:
            import_xgrammar()
        import numpy as np
        import xgrammar

        self._xgrammar = xgrammar
        self._bits: NDArray[np.int32] = np.zeros((1, 9), dtype=np.int32)
        self._octets = self._bits.view(np.uint8)
        self._unpackbits = np.unpackbits
        self._json = self._compiler(_FIRST_PRINTABLE)
        self._other = self._compiler(0)

    def _compiler(self, first: int) -> Any:
        table = [bytes([value]) if value >= first else b"" for value in range(256)]
        info = self._xgrammar.TokenizerInfo(
            [*table, b""],
            self._xgrammar.VocabType.RAW,
            vocab_size=257,
            stop_token_ids=[_STOP],
        )
        return self._xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def run(self, grammar: Grammar) -> None:
        """Test the EBNF of a grammar. Raises ``GrammarError`` for a grammar that no engine may
        compile."""
        kind = grammar.kind
        compiler = self._json if kind is GrammarKind.JSON_SCHEMA else self._other
        try:
            compiled = compiler.compile_grammar(grammar.ebnf)
        except (RuntimeError, ValueError, TypeError) as error:
            raise refusal(kind, error) from None
        if compiled.memory_size_bytes > MAX_BYTES:
            raise GrammarError(
                f"grammar.{kind.value}",
                f"takes {compiled.memory_size_bytes} bytes of memory when compiled, at most "
                f"{MAX_BYTES} are allowed; make it smaller",
                reason="GRAMMAR_TOO_COSTLY",
                metadata={"limit": str(MAX_BYTES), "actual": str(compiled.memory_size_bytes)},
            )
        if not self._allowed(self._xgrammar.GrammarMatcher(compiled)).any():
            raise refusal(kind, ValueError("it matches no text"))
        if kind is GrammarKind.EBNF:  # other grammars are unambiguous by construction
            for choose in _choices():
                self._walk(compiled, choose)

    def _allowed(self, matcher: Any) -> NDArray[np.uint8]:
        """uint8 (256,): 1 for each byte that may come next."""
        matcher.fill_next_token_bitmask(self._bits)
        return self._unpackbits(self._octets[0], count=_STOP, bitorder="little")

    def _walk(self, compiled: Any, choose: Callable[[NDArray[np.uint8]], int]) -> None:
        """Match a text that the grammar allows, and measure the time. Raises when it is too
        slow."""
        matcher = self._xgrammar.GrammarMatcher(compiled)
        spent_s = 0.0
        for _ in range(WALK_BYTES):
            allowed = self._allowed(matcher)
            if not allowed.any():
                return
            byte = choose(allowed)
            begun = time.thread_time()
            matcher.accept_token(byte)
            step_s = time.thread_time() - begun
            spent_s += step_s
            if step_s > STEP_LIMIT_S or spent_s > WALK_LIMIT_S:
                raise too_costly(f"grammar.{GrammarKind.EBNF.value}")


def _choices() -> list[Callable[[NDArray[np.uint8]], int]]:
    """Strategies to choose the next byte: the lowest, the highest, a random one, or the previous
    byte again where it is allowed.

    A costly grammar is usually costly for one kind of text only, mostly for repetitions.
    """
    chance = random.Random(0)
    last = _STOP

    def any_of(allowed: NDArray[np.uint8]) -> int:
        return int(chance.choice(allowed.nonzero()[0]))

    def again(allowed: NDArray[np.uint8]) -> int:
        nonlocal last
        if last == _STOP or not allowed[last]:
            last = any_of(allowed)
        return last

    return [
        lambda allowed: int(allowed.argmax()),
        lambda allowed: len(allowed) - 1 - int(allowed[::-1].argmax()),
        any_of,
        again,
    ]
