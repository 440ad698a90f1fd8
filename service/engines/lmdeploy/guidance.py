"""Guided decoding on LMDeploy, so that it cannot be switched off without a word.

Stock LMDeploy compiles a request's grammar on the event loop and, on an error, goes on without it.
Here every grammar is compiled before, in a thread of our own, and the engine gets the result:

- TurboMind: the compiled grammar itself, set on the request object. LMDeploy's own path
  (``response_format``) is not used.
- PyTorch, model in this process: LMDeploy looks its compiler up for each request; ours stands in
  that place and gives out what is compiled already.
- PyTorch, model in other processes (several GPUs): the EBNF as text, which was compiled here first.

Special tokens have no bytes in the vocabulary that grammars see, so no free string can hold one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from service.compile_errors import refusal
from service.engines.common.grammar import (
    CompiledGrammar,
    GrammarCompiler,
    analysed_ebnf,
    compile_threads,
)
from service.types import Grammar, GrammarKind

_RAW = 0  # xgrammar's VocabType of tables that are bytes already
_FIRST_PRINTABLE = 0x20
_BYTES = (*(bytes([value]) for value in range(256)), b"")
_BYTES_STOP = 256
_NO_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
_SMALL_STATE_BYTES = 96
"""Of a grammar over single bytes, for each mask that the same grammar needs over a vocabulary.
Measured on eleven grammars and 152,000 tokens: 100 to 20,000."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A compiled grammar on its way into an engine. size_bytes: memory that it takes, about."""

    compiled: Any
    size_bytes: int


class Compiler(Protocol):
    """Compiles for one backend. Called in threads."""

    def compile(self, grammar: Grammar) -> Constraint:
        """Raises GrammarError when the grammar cannot be compiled or has no text."""
        ...


class TurboMindCompiler:
    """Compiles with the xgrammar inside TurboMind's module.

    module: has ``TokenizerInfo`` and ``GrammarCompiler`` with the signatures of TurboMind's module.
    table: the bytes of every id of the logits, empty for ids that are never text.
    """

    def __init__(self, module: Any, table: Sequence[bytes], stop_ids: Sequence[int]) -> None:
        # The module's xgrammar lets bytes into strings that are in no UTF-8 text; ours does not.
        legal = [b"" if _NO_UTF8.intersection(piece) else piece for piece in table]
        self._json = _compiler(module, _printable(legal), stop_ids)
        self._other = _compiler(module, legal, stop_ids)
        # A grammar over single bytes compiles in no time, and tells what is wrong with it.
        self._check = GrammarCompiler(_BYTES, [_BYTES_STOP])
        self._mask_bytes = len(table) // 8

    def compile(self, grammar: Grammar) -> Constraint:
        """See `Compiler.compile`."""
        small = self._check.compile(grammar)
        tag = json.dumps(_tag(analysed_ebnf(grammar)))
        try:
            compiled = self._of(grammar).compile_structural_tag(tag)
        except (RuntimeError, ValueError, TypeError) as error:
            raise refusal(grammar.kind, error) from None
        return Constraint(compiled, estimated_bytes(small, self._mask_bytes))

    def _of(self, grammar: Grammar) -> Any:
        return self._json if grammar.kind is GrammarKind.JSON_SCHEMA else self._other


class PyTorchCompiler:
    """Compiles with the xgrammar that LMDeploy's PyTorch engine uses, in its process or as text."""

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
        compiled = _tag(analysed_ebnf(grammar)) if self._as_text else found.automaton
        return Constraint(compiled, found.size_bytes)


class Handover:
    """Stands where LMDeploy's PyTorch engine keeps its compiler, and compiles nothing.

    A request's grammar is put in before the request is sent and taken out when it has ended.
    """

    def __init__(self) -> None:
        self._ready: dict[int, Any] = {}

    def put(self, session_id: int, compiled: Any) -> dict[str, Any]:
        """Keep a compiled grammar; returns the ``response_format`` that asks for it."""
        self._ready[session_id] = compiled
        return {"type": "structural_tag", "session": session_id}

    def drop(self, session_id: int) -> None:
        """Forget the grammar of a request; harmless when there is none."""
        self._ready.pop(session_id, None)

    def compile_structural_tag(self, source: str) -> Any:
        """What LMDeploy calls for a new request. KeyError would mean that it made one up."""
        return self._ready[json.loads(source)["session"]]


def estimated_bytes(small: CompiledGrammar, mask_bytes: int) -> int:
    """An upper estimate of what a grammar takes over a full vocabulary; TurboMind does not tell."""
    return small.size_bytes * max(1, mask_bytes // _SMALL_STATE_BYTES)


def _compiler(module: Any, table: Sequence[bytes], stop_ids: Sequence[int]) -> Any:
    info = module.TokenizerInfo(list(table), _RAW, len(table), list(stop_ids), False)
    return module.GrammarCompiler(info, compile_threads(), False, -1)  # no cache of its own


def _printable(table: Sequence[bytes]) -> list[bytes]:
    """The table without tokens that hold a control character.

    xgrammar lets them into strings of bounded length; JSON has none anywhere.
    """
    return [piece if piece and min(piece) >= _FIRST_PRINTABLE else b"" for piece in table]


def _tag(ebnf: str) -> dict[str, Any]:
    return {"type": "structural_tag", "format": {"type": "grammar", "grammar": ebnf}}
