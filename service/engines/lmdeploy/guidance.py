"""Guided decoding on LMDeploy that is never switched off silently.

Stock LMDeploy compiles a request's grammar on the event loop and, after an error, runs the request
without it. This module compiles every grammar beforehand, in a separate thread, and passes the
result to the engine:

- TurboMind: the compiled grammar is set on the request object. LMDeploy's ``response_format`` is
  not used.
- PyTorch, model in this process: LMDeploy looks up its compiler for each request; this module
  replaces that compiler by an object that returns the compiled grammar.
- PyTorch, model in other processes (several GPUs): LMDeploy gets the EBNF as text, after this
  process has compiled it successfully.

In the vocabulary for grammars, special tokens have no bytes, so that no string can contain them.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from lmdeploy_ext.lengths.binding import Library, Limits, Vocabulary
from lmdeploy_ext.lengths.follower import Follower
from lmdeploy_ext.lengths.table import Table
from lmdeploy_ext.lengths.vocabulary import Vocabulary as TokenMasks
from service.compile_errors import refusal
from service.engines.common.grammar import (
    CompiledGrammar,
    GrammarCompiler,
    analysed_ebnf,
    compile_threads,
)
from service.errors import InternalError
from service.types import Grammar, GrammarKind

_RAW = 0  # xgrammar's VocabType for vocabularies that are already bytes
_FIRST_PRINTABLE = 0x20
_BYTES = (*(bytes([value]) for value in range(256)), b"")
_BYTES_STOP = 256
_NO_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
_SMALL_STATE_BYTES = 96
"""Size of a grammar compiled over single bytes, in bytes per mask that the same grammar needs over a
full vocabulary; the lower bound. Measured with eleven grammars and 152,000 tokens: 100 to 20,000."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A compiled grammar for an engine. size_bytes: approximate memory. lengths: limits of strings that
    this process keeps beside the grammar. registered: the same for TurboMind's process-wide hooks, as
    long as this object lives."""

    compiled: Any
    size_bytes: int
    lengths: Table | None = None
    registered: Registered | None = None


class Compiler(Protocol):
    """Compiles grammars for one backend. Called in threads."""

    def compile(self, grammar: Grammar) -> Constraint:
        """Compile a grammar. Raises GrammarError when the grammar cannot be compiled or matches no
        text."""
        ...


class TurboMindCompiler:
    """Compiles with the xgrammar inside TurboMind's module.

    module: has ``TokenizerInfo`` and ``GrammarCompiler`` with the signatures of TurboMind's module.
    table: the bytes of every id of the logits, empty for ids that are never text. limiter: intercepts
    TurboMind's xgrammar, to keep limits of strings; None where that is not possible.
    """

    def __init__(
        self,
        module: Any,
        table: Sequence[bytes],
        stop_ids: Sequence[int],
        limiter: Library | None = None,
    ) -> None:
        # Unlike the xgrammar package, the module's xgrammar allows bytes that are invalid in UTF-8.
        legal = [b"" if _NO_UTF8.intersection(piece) else piece for piece in table]
        self._json = _compiler(module, _printable(legal), stop_ids)
        self._other = _compiler(module, legal, stop_ids)
        # Compiling over single bytes is fast and gives good error messages.
        self._check = GrammarCompiler(_BYTES, [_BYTES_STOP])
        self._mask_bytes = len(table) // 8
        self._limiter, self._table = limiter, table

    def compile(self, grammar: Grammar) -> Constraint:
        """See `Compiler.compile`."""
        small = self._check.compile(grammar)
        tag = json.dumps(_tag(analysed_ebnf(grammar)))
        try:
            compiled = self._of(grammar).compile_structural_tag(tag)
        except (RuntimeError, ValueError, TypeError) as error:
            raise refusal(grammar.kind, error) from None
        size = estimated_bytes(small, self._mask_bytes)
        if not grammar.lengths:
            return Constraint(compiled, size)
        if self._limiter is None:
            raise InternalError("a grammar with limits of strings, which this engine does not keep")
        limits = self._vocabulary.limits(Table(grammar.lengths))
        registered = Registered(self._limiter, compiled, limits)
        return Constraint(compiled, size + limits.size_bytes, registered=registered)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        """The tokens for limits of strings; made for the first grammar that has some."""
        assert self._limiter is not None
        return self._limiter.vocabulary(self._table)

    def _of(self, grammar: Grammar) -> Any:
        return self._json if grammar.kind is GrammarKind.JSON_SCHEMA else self._other


class Registered:
    """The limits of one of TurboMind's compiled grammars, until this object is deleted.

    A request has to keep its constraint until LMDeploy has released the request: the matcher may be
    made late.
    """

    def __init__(self, limiter: Library, compiled: Any, limits: Limits) -> None:
        address = implementation(compiled)
        self._compiled = compiled  # as long as it lives, no other grammar gets its address
        limiter.limit(address, limits)
        weakref.finalize(self, limiter.limit, address, None)


def implementation(compiled: Any) -> int:
    """The address of the implementation of a grammar that TurboMind's module has compiled.

    pybind11 keeps the address of the C++ object behind the header of a Python object; the first word
    of that object is the address of its implementation.
    """
    word = ctypes.c_void_p.from_address
    held = word(id(compiled) + object.__basicsize__).value
    found = None if held is None else word(held).value
    if found is None:
        raise InternalError("a compiled grammar of TurboMind without an implementation")
    return found


class PyTorchCompiler:
    """Compiles for LMDeploy's PyTorch engine, whose model runs in this process or in others."""

    def __init__(self, table: Sequence[bytes], stop_ids: Sequence[int], *, as_text: bool) -> None:
        self._as_text = as_text
        threads = compile_threads()
        self._plain = GrammarCompiler(table, stop_ids, threads)
        self._json = (
            self._plain if as_text else GrammarCompiler(_printable(table), stop_ids, threads)
        )

    def compile(self, grammar: Grammar) -> Constraint:
        """See `Compiler.compile`; with ``as_text`` the constraint is a ``response_format``."""
        is_json = grammar.kind is GrammarKind.JSON_SCHEMA
        found = (self._json if is_json else self._plain).compile(grammar)
        if self._as_text and grammar.lengths:
            raise InternalError("a grammar with limits of strings for a model in other processes")
        compiled = _tag(analysed_ebnf(grammar)) if self._as_text else found.automaton
        return Constraint(compiled, found.size_bytes, found.lengths)


class Handover:
    """Replaces the compiler of LMDeploy's PyTorch engine, and only returns compiled grammars.

    The grammar of a request is added before the request is sent, and removed when it has ended.
    """

    def __init__(self) -> None:
        self._ready: dict[int, Any] = {}
        self._lengths: dict[int, Table] = {}

    def put(self, session_id: int, compiled: Any, lengths: Table | None = None) -> dict[str, Any]:
        """Add a compiled grammar and the limits of its strings; returns the ``response_format`` that
        selects it."""
        self._ready[session_id] = compiled
        if lengths is not None:
            self._lengths[session_id] = lengths
        return {"type": "structural_tag", "session": session_id}

    def drop(self, session_id: int) -> None:
        """Remove the grammar of a request; does nothing if there is none."""
        self._ready.pop(session_id, None)
        self._lengths.pop(session_id, None)

    def lengths(self, session_id: int) -> Table | None:
        """The limits of the strings of a request."""
        return self._lengths.get(session_id)

    def compile_structural_tag(self, source: str) -> Any:
        """Called by LMDeploy for a new request. Raises KeyError for an unknown grammar, which would
        be a bug."""
        return self._ready[json.loads(source)["session"]]


class LimitedDecoding:
    """Keeps limits of strings in the masks of LMDeploy's PyTorch engine.

    Replaces three methods of its ``GuidedDecodingManager``, which makes a matcher for each request, asks
    it for masks and has it accept tokens.
    """

    METHODS = ("get_processor", "fill_bitmap", "accept_token")
    FOLLOWER = "length_follower"
    """Attribute of a matcher, whose class is not hashable."""

    def __init__(self, manager: Any, handover: Handover, table: Sequence[bytes]) -> None:
        self._handover, self._table = handover, table
        self._get, self._fill, self._accept = (getattr(manager, name) for name in self.METHODS)
        for name in self.METHODS:
            setattr(manager, name, getattr(self, name))

    def get_processor(self, session_id: int, seq_id: int, response_format: dict[str, Any]) -> Any:
        """The matcher of a request."""
        processor = self._get(session_id, seq_id, response_format)
        lengths = self._handover.lengths(response_format["session"])
        if lengths is not None and not hasattr(processor, self.FOLLOWER):
            setattr(processor, self.FOLLOWER, Follower(lengths))
        return processor

    def fill_bitmap(self, processor: Any, guided_bitmask: Any, index: int) -> None:
        """Write the mask of a request. guided_bitmask: int32 (requests, W), on the CPU."""
        self._fill(processor, guided_bitmask, index)
        follower = getattr(processor, self.FOLLOWER, None)
        if follower is not None:
            self._vocabulary.narrow_inplace(guided_bitmask[index].numpy(), follower)

    def accept_token(self, processor: Any, token: int) -> None:
        """Go on with the token that was chosen."""
        self._accept(processor, token)
        follower = getattr(processor, self.FOLLOWER, None)
        if follower is not None:
            follower.feed(self._table[token])

    @cached_property
    def _vocabulary(self) -> TokenMasks:
        return TokenMasks(self._table)


def estimated_bytes(small: CompiledGrammar, mask_bytes: int) -> int:
    """An upper estimate of a grammar's memory over a full vocabulary; TurboMind does not report
    it."""
    return int(small.automaton.memory_size_bytes) * max(1, mask_bytes // _SMALL_STATE_BYTES)


def _compiler(module: Any, table: Sequence[bytes], stop_ids: Sequence[int]) -> Any:
    info = module.TokenizerInfo(list(table), _RAW, len(table), list(stop_ids), False)
    return module.GrammarCompiler(info, compile_threads(), False, -1)  # not cached by xgrammar


def _printable(table: Sequence[bytes]) -> list[bytes]:
    """The table without tokens that contain a control character.

    xgrammar allows them in strings of bounded length, where JSON does not.
    """
    return [piece if piece and min(piece) >= _FIRST_PRINTABLE else b"" for piece in table]


def _tag(ebnf: str) -> dict[str, Any]:
    return {"type": "structural_tag", "format": {"type": "grammar", "grammar": ebnf}}
