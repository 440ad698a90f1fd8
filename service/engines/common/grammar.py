"""Guided decoding: grammars compiled by xgrammar off the event loop, and one matcher per answer.

Engines compile the EBNF of a grammar, which its analysis made, and nothing else: JSON has exactly
the whitespace of Python's ``json.dumps`` there, as a model that may put blanks anywhere can put
blanks for ever. It has been compiled before, over single bytes and in a process that could be killed
(docs/decisions/0003-compiling-grammars.md).

Special tokens have no bytes in the vocabulary that xgrammar is given, so no free string can hold
one, and ids beyond the tokenizer are forbidden with them; a second mask makes sure of both.

Letters: V width of the logits; W = ceil(V / 32) words of a mask.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from service import metrics
from service.compile_errors import refusal, too_costly
from service.errors import EngineUnavailable, InternalError, Overloaded
from service.types import Grammar, GrammarKind

if TYPE_CHECKING:
    import xgrammar
    from numpy.typing import NDArray
    from torch import Tensor

CACHE = "engine"
MAX_RUNNING = 64
"""Grammars that are compiled, or wait for it, at the same time."""
MAX_THREADS = 8
_FIRST_PRINTABLE = 0x20
STEP_LIMIT_S = 0.05
"""Processor time in which a grammar must take one token; ordinary ones need a thousandth of it."""
ANSWER_LIMIT_S = 2.0
"""The same for all tokens of an answer."""
MASK_LIMIT_S = 1.0
"""Processor time in which a grammar must say what may come next. Ordinary ones need a few thousandths
of it; a count of characters or items that is large is a parser's work for each token of the
vocabulary, and more with each one."""
MASKS_LIMIT_S = 20.0
"""The same for all tokens of an answer."""


def compile_threads() -> int:
    """Threads for one grammar. Two compile at a time, and answers are decoded meanwhile."""
    return min(max((os.cpu_count() or 1) // 4, 1), MAX_THREADS)


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """xgrammar's automaton, whether its texts are JSON, and whether what it forces is bounded."""

    automaton: xgrammar.CompiledGrammar
    is_json: bool
    bounded: bool

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""
        return int(self.automaton.memory_size_bytes)


class GrammarCompiler:
    """Compiles one grammar at a time, in the calling thread; nothing else asks xgrammar to."""

    def __init__(self, table: Sequence[bytes], stop_ids: Sequence[int], threads: int = 1) -> None:
        """table: bytes of every id of the logits, empty for ids that are never text."""
        import xgrammar

        def _bits(indices: Iterable[int]) -> NDArray[np.int32]:
            words = [0] * -(-len(table) // 32)
            for index in indices:
                words[index // 32] |= 1 << (index % 32)
            return np.array([words], dtype=np.uint32).view(np.int32)  # (1, W)

        self.vocab_size = len(table)
        self.stop_ids = tuple(stop_ids)
        info = xgrammar.TokenizerInfo(
            list(table),
            xgrammar.VocabType.RAW,
            vocab_size=len(table),
            stop_token_ids=list(stop_ids),
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=threads, cache_enabled=False)
        stops = set(self.stop_ids)
        self.permitted = _bits(
            index for index, piece in enumerate(table) if piece or index in stops
        )
        # xgrammar lets control characters into strings of bounded length. JSON has none anywhere
        # that is not escaped: the separators hold no line break either.
        self.permitted_json = _bits(
            index
            for index, piece in enumerate(table)
            if index in stops or (piece and min(piece) >= _FIRST_PRINTABLE)
        )
        self.only_stop = _bits(stops)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Raises GrammarError with the cause when the grammar cannot be compiled or has no text,
        InternalError when it was not analysed."""
        ebnf = analysed_ebnf(grammar)
        try:
            automaton = self._compiler.compile_grammar(ebnf)
        except (RuntimeError, ValueError, TypeError) as error:
            raise refusal(grammar.kind, error) from None
        is_json = grammar.kind is GrammarKind.JSON_SCHEMA
        compiled = CompiledGrammar(automaton, is_json, grammar.forces_little)
        if not Matcher(compiled, self).can_go_on():
            raise refusal(grammar.kind, ValueError("no text fits it"))
        return compiled


def analysed_ebnf(grammar: Grammar) -> str:
    """What engines compile. Raises InternalError for a grammar that was not analysed."""
    if not grammar.ebnf:
        raise InternalError(f"a grammar of kind {grammar.kind.value} that was not analysed")
    return grammar.ebnf


class Sized(Protocol):
    """Anything that knows what memory it takes."""

    @property
    def size_bytes(self) -> int: ...


S = TypeVar("S", bound=Sized)
S_co = TypeVar("S_co", bound=Sized, covariant=True)


class Compiles(Protocol[S_co]):
    """Compiles grammars; called in threads."""

    def compile(self, grammar: Grammar) -> S_co:
        """Raises GrammarError."""
        ...


Key = tuple[str, bool, bool]


class GrammarCache(Generic[S]):
    """Compiled grammars by what is compiled, the least recently used leaving first.

    Equal grammars in other spellings share one, and concurrent requests for it one compilation. A
    grammar larger than the whole cache is used but not kept.
    """

    def __init__(self, compiler: Compiles[S], limit_bytes: int, threads: int) -> None:
        self._compiler = compiler
        self._limit = limit_bytes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="grammar")
        self._ready: OrderedDict[Key, S] = OrderedDict()
        self._running: dict[Key, asyncio.Future[S]] = {}
        self.size_bytes = 0

    async def get(self, grammar: Grammar) -> S:
        """Compile, or find. Raises GrammarError, Overloaded, InternalError."""
        key = (
            analysed_ebnf(grammar),
            grammar.kind is GrammarKind.JSON_SCHEMA,
            grammar.forces_little,
        )
        found = self._ready.get(key)
        if found is not None:
            self._ready.move_to_end(key)
            metrics.grammar_cache_hits.labels(CACHE).inc()
            return found
        future = self._running.get(key)
        if future is None:
            metrics.grammar_cache_misses.labels(CACHE).inc()
            future = self._begin(key, grammar)
        else:
            metrics.grammar_cache_hits.labels(CACHE).inc()
        # One caller that goes away must not cancel the compilation that others wait for.
        return await asyncio.shield(future)

    def close(self) -> None:
        """Forget everything; compilations under way run out in their threads."""
        self._pool.shutdown(wait=False)
        self._ready.clear()
        self.size_bytes = 0

    def _begin(self, key: Key, grammar: Grammar) -> asyncio.Future[S]:
        if len(self._running) >= MAX_RUNNING:
            raise Overloaded("Too many new grammars are being compiled.", retry_after_s=1.0)
        loop = asyncio.get_running_loop()
        try:
            future = loop.run_in_executor(self._pool, self._timed, grammar)
        except RuntimeError:  # the pool is shut down
            raise EngineUnavailable("the engine is closed", reason="ENGINE_CLOSED") from None
        self._running[key] = future
        future.add_done_callback(lambda done: self._keep(key, done))
        return future

    def _timed(self, grammar: Grammar) -> S:
        with metrics.grammar_compile_seconds.labels(CACHE).time():
            return self._compiler.compile(grammar)

    def _keep(self, key: Key, done: asyncio.Future[S]) -> None:
        self._running.pop(key, None)
        if done.cancelled() or done.exception() is not None:
            return
        compiled = done.result()
        size = compiled.size_bytes
        if size > self._limit:
            return
        self._ready[key] = compiled
        self.size_bytes += size
        while self.size_bytes > self._limit:
            _, oldest = self._ready.popitem(last=False)
            self.size_bytes -= oldest.size_bytes
            metrics.grammar_cache_evictions.labels(CACHE).inc()


class Matcher:
    """Follows one answer through its grammar. Belongs to the thread that decodes."""

    def __init__(self, compiled: CompiledGrammar, compiler: GrammarCompiler) -> None:
        import xgrammar

        self._permitted = compiler.permitted_json if compiled.is_json else compiler.permitted
        self._matcher = xgrammar.GrammarMatcher(compiled.automaton)
        self._bounded = compiled.bounded
        self._compiler = compiler
        self._apply = xgrammar.apply_token_bitmask_inplace
        self._mask: Tensor = xgrammar.allocate_token_bitmask(1, compiler.vocab_size)  # (1, W)
        # The same memory: numpy is faster for so little.
        self._bits: NDArray[np.int32] = self._mask.numpy()
        self._fresh = False
        self._spent_s = 0.0
        self._masks_s = 0.0

    def mask_inplace(self, logits: Tensor) -> None:
        """Set logits (1, V) of tokens that may not come next to minus infinity.

        Raises:
            InternalError: the width is not that of the vocabulary, or no token is left.
            GrammarError: finding out what may come next takes too long.
        """
        width = self._compiler.vocab_size
        if logits.shape[-1] != width:
            raise InternalError(f"logits of width {logits.shape[-1]} for {width} tokens")
        if not self._next_bits().any():
            raise InternalError("the grammar leaves no token")
        self._apply(logits, self._mask)

    def accept(self, token: int) -> None:
        """Take the chosen token.

        A grammar that reads a text in ever more ways takes ever longer, and all requests wait.

        Raises:
            InternalError: the grammar refuses the token.
            GrammarError: reading the answer takes too long.
        """
        begun = time.thread_time()
        if not self._matcher.accept_token(token):
            raise InternalError(f"the grammar refused token {token}, which its mask had allowed")
        step = time.thread_time() - begun
        self._spent_s += step
        self._fresh = False
        if step > STEP_LIMIT_S or self._spent_s > ANSWER_LIMIT_S:
            raise too_costly()

    def must_stop(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return self._matcher.is_completed() and not self.can_go_on()

    def can_go_on(self) -> bool:
        """Whether there is text that may come next."""
        return bool((self._next_bits() & ~self._compiler.only_stop).any())

    def forced_text(self) -> str:
        """The text that must come next whatever the model says; often empty.

        Empty, too, where it could be endless: xgrammar writes all of it out.
        """
        if not self._bounded:
            return ""
        try:
            return str(self._matcher.find_jump_forward_string())
        except UnicodeDecodeError:  # it begins or ends inside a character
            return ""

    def _next_bits(self) -> NDArray[np.int32]:
        """(1, W), the memory of the mask; filled once between two tokens."""
        if not self._fresh:
            begun = time.thread_time()
            self._matcher.fill_next_token_bitmask(self._mask)
            self._bits &= self._permitted
            self._fresh = True
            step = time.thread_time() - begun
            self._masks_s += step
            if step > MASK_LIMIT_S or self._masks_s > MASKS_LIMIT_S:
                raise too_costly()
        return self._bits
