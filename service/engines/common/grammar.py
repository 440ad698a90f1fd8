"""Guided decoding: xgrammar compiles grammars outside the event loop; each answer has its own
matcher.

Engines only compile EBNF that the analysis of a grammar has produced. In this EBNF, JSON has
exactly the whitespace of Python's ``json.dumps``, because a model that may write whitespace
anywhere can write it without end. A worker process, which can be killed, has already compiled the
EBNF, with a vocabulary of the 256 bytes (docs/decisions/0003-compiling-grammars.md).

In the vocabulary for xgrammar, special tokens and ids beyond the tokenizer have no bytes, so that
no string can contain them. A second mask (``permitted``) also forbids both. Lengths of strings are
counted beside the grammar, see `lmdeploy_ext.lengths`.

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
from functools import cached_property
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from lmdeploy_ext.lengths.follower import Follower
from lmdeploy_ext.lengths.table import Table
from lmdeploy_ext.lengths.vocabulary import Vocabulary
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
"""Maximum number of grammars that are compiled, or wait for compilation, at the same time."""
MAX_THREADS = 8
_FIRST_PRINTABLE = 0x20
STEP_LIMIT_S = 0.05
"""Maximum processor time to accept one token, in seconds; ordinary grammars need 0.001 s."""
ANSWER_LIMIT_S = 2.0
"""Maximum processor time to accept all tokens of an answer, in seconds."""
MASK_LIMIT_S = 1.0
"""Maximum processor time to compute one mask, in seconds. Ordinary grammars need a few milliseconds.
Large counts of characters or items cost time for each token of the vocabulary, and more with every
token of the answer."""
MASKS_LIMIT_S = 20.0
"""Maximum processor time to compute the masks for all tokens of an answer, in seconds."""


def compile_threads() -> int:
    """Number of threads to compile one grammar: few enough that meanwhile another grammar can be
    compiled and answers can be decoded."""
    return min(max((os.cpu_count() or 1) // 4, 1), MAX_THREADS)


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar, ready for decoding.

    automaton: the grammar as xgrammar compiled it.
    is_json: whether its texts are JSON.
    bounded: whether the length of forced text is bounded.
    lengths: limits of strings that the automaton does not have; None where there are none.
    """

    automaton: xgrammar.CompiledGrammar
    is_json: bool
    bounded: bool
    lengths: Table | None = None

    @property
    def size_bytes(self) -> int:
        """Memory of the compiled grammar, in bytes."""
        beside = 0 if self.lengths is None else self.lengths.size_bytes
        return int(self.automaton.memory_size_bytes) + beside


class GrammarCompiler:
    """Compiles grammars in the calling thread. The only code that calls xgrammar's compiler."""

    def __init__(self, table: Sequence[bytes], stop_ids: Sequence[int], threads: int = 1) -> None:
        """table: the bytes of every token id of the logits, empty for ids that are never text."""
        import xgrammar

        def _bits(indices: Iterable[int]) -> NDArray[np.int32]:
            words = [0] * -(-len(table) // 32)
            for index in indices:
                words[index // 32] |= 1 << (index % 32)
            return np.array([words], dtype=np.uint32).view(np.int32)  # (1, W)

        self.table = table
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
        # xgrammar allows control characters in strings of bounded length. Valid JSON here contains
        # none: strings escape them, and the separators have no line breaks.
        self.permitted_json = _bits(
            index
            for index, piece in enumerate(table)
            if index in stops or (piece and min(piece) >= _FIRST_PRINTABLE)
        )
        self.only_stop = _bits(stops)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compile a grammar. Raises GrammarError when the grammar cannot be compiled or matches no
        text, InternalError when the grammar was not analysed."""
        ebnf = analysed_ebnf(grammar)
        try:
            automaton = self._compiler.compile_grammar(ebnf)
        except (RuntimeError, ValueError, TypeError) as error:
            raise refusal(grammar.kind, error) from None
        is_json = grammar.kind is GrammarKind.JSON_SCHEMA
        lengths = Table(grammar.lengths) if grammar.lengths else None
        compiled = CompiledGrammar(automaton, is_json, grammar.forces_little, lengths)
        if not Matcher(compiled, self).can_go_on():
            raise refusal(grammar.kind, ValueError("it matches no text"))
        return compiled

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens for limits of strings; made for the first grammar that has some."""
        return Vocabulary(self.table)


def analysed_ebnf(grammar: Grammar) -> str:
    """The EBNF of an analysed grammar. Raises InternalError for a grammar that was not analysed."""
    if not grammar.ebnf:
        raise InternalError(f"a grammar of kind {grammar.kind.value} that was not analysed")
    return grammar.ebnf


class Sized(Protocol):
    """A value that knows its memory size."""

    @property
    def size_bytes(self) -> int: ...


S = TypeVar("S", bound=Sized)
S_co = TypeVar("S_co", bound=Sized, covariant=True)


class Compiles(Protocol[S_co]):
    """Compiles grammars; called in threads."""

    def compile(self, grammar: Grammar) -> S_co:
        """Raises GrammarError."""
        ...


Key = tuple[str, bool, bool, bytes]


class GrammarCache(Generic[S]):
    """A cache of compiled grammars with least-recently-used eviction. Its key is the EBNF with the
    limits of strings.

    Sources with the same EBNF share one entry, and concurrent requests share one compilation. A
    grammar larger than the whole cache is used but not cached.
    """

    def __init__(self, compiler: Compiles[S], limit_bytes: int, threads: int) -> None:
        self._compiler = compiler
        self._limit = limit_bytes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="grammar")
        self._ready: OrderedDict[Key, S] = OrderedDict()
        self._running: dict[Key, asyncio.Future[S]] = {}
        self.size_bytes = 0

    async def get(self, grammar: Grammar) -> S:
        """The compiled grammar, from the cache or newly compiled. Raises GrammarError, Overloaded
        or InternalError."""
        key = (
            analysed_ebnf(grammar),
            grammar.kind is GrammarKind.JSON_SCHEMA,
            grammar.forces_little,
            grammar.lengths,
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
        # A caller that is cancelled must not cancel the compilation for which other callers wait.
        return await asyncio.shield(future)

    def close(self) -> None:
        """Clear the cache. Running compilations end in their threads."""
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
    """Matches one answer against its grammar, token by token. Used only by the decoding thread."""

    def __init__(self, compiled: CompiledGrammar, compiler: GrammarCompiler) -> None:
        import xgrammar

        self._permitted = compiler.permitted_json if compiled.is_json else compiler.permitted
        self._matcher = xgrammar.GrammarMatcher(compiled.automaton)
        self._bounded = compiled.bounded
        self._follower = None if compiled.lengths is None else Follower(compiled.lengths)
        self._compiler = compiler
        self._apply = xgrammar.apply_token_bitmask_inplace
        self._mask: Tensor = xgrammar.allocate_token_bitmask(1, compiler.vocab_size)  # (1, W)
        # A view of the same memory: for so few numbers numpy is faster than torch.
        self._bits: NDArray[np.int32] = self._mask.numpy()
        self._fresh = False
        self._spent_s = 0.0
        self._masks_s = 0.0

    def mask_inplace(self, logits: Tensor) -> None:
        """Set the logits (1, V) of forbidden tokens to minus infinity.

        Raises:
            InternalError: the width of the logits is wrong, or no token is allowed.
            GrammarError: computing the mask takes too long.
        """
        width = self._compiler.vocab_size
        if logits.shape[-1] != width:
            raise InternalError(f"logits of width {logits.shape[-1]} for {width} tokens")
        if not self._next_bits().any():
            raise InternalError("the grammar allows no token")
        self._apply(logits, self._mask)

    def accept(self, token: int) -> None:
        """Advance by the chosen token.

        An ambiguous grammar can need more time for each token, and all requests of the batch wait
        for it.

        Raises:
            InternalError: the grammar refuses the token.
            GrammarError: matching the answer takes too long.
        """
        begun = time.thread_time()
        if not self._matcher.accept_token(token):
            raise InternalError(f"the grammar refused token {token}, which its mask had allowed")
        if self._follower is not None and not self._follower.feed(self._compiler.table[token]):
            raise InternalError(f"token {token} breaks a limit of a string, which its mask holds")
        step = time.thread_time() - begun
        self._spent_s += step
        self._fresh = False
        if step > STEP_LIMIT_S or self._spent_s > ANSWER_LIMIT_S:
            raise too_costly()

    def must_stop(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return self._matcher.is_completed() and not self.can_go_on()

    def can_go_on(self) -> bool:
        """Whether the grammar allows more text."""
        return bool((self._next_bits() & ~self._compiler.only_stop).any())

    def forced_text(self) -> str:
        """The text that the grammar forces next, independent of the model; often empty.

        Also empty if the forced text could be endless, because xgrammar would return all of it.
        """
        if not self._bounded:
            return ""
        try:
            return str(self._matcher.find_jump_forward_string())
        except UnicodeDecodeError:  # the forced text begins or ends inside a character
            return ""

    def _next_bits(self) -> NDArray[np.int32]:
        """The mask (1, W), computed once for each token."""
        if not self._fresh:
            begun = time.thread_time()
            self._matcher.fill_next_token_bitmask(self._mask)
            self._bits &= self._permitted
            if self._follower is not None:
                self._compiler.vocabulary.narrow_inplace(self._bits[0], self._follower)
            self._fresh = True
            step = time.thread_time() - begun
            self._masks_s += step
            if step > MASK_LIMIT_S or self._masks_s > MASKS_LIMIT_S:
                raise too_costly()
        return self._bits
