"""Grammar engines that compile a JSON schema and follow a text, for `benchmarks.maskbench`.

Each has a vocabulary of the 256 bytes and an end, so that a text has one reading and no tokenizer
is measured.
"""

from __future__ import annotations

import gc
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits
from service.structured_output.worker import collect
from service.types import Grammar as Asked
from service.types import PropertyOrder

if TYPE_CHECKING:
    from service.engines.common.grammar import CompiledGrammar, GrammarCompiler
    from service.schema_compiler.report import Analysed

LARGE_LIMITS = SchemaLimits(max_bytes=256 * 1024, max_regex_length=2048)
"""For collections with schemas over the default limits; both are settings of the service."""
END = 256
"""Id of the token behind the last byte."""


class Refused(Exception):
    """A schema that an engine does not take.

    reason: the engine's word for it. located: whether it says where in the schema, or with what
    limit and what size.
    """

    def __init__(self, message: str, reason: str = "", located: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.located = located


@dataclass(frozen=True)
class Followed:
    """accepted: whether the whole text is one of the grammar. bytes: how many of it were taken.
    seconds: for masks and steps. slowest_s: for one byte."""

    accepted: bool
    bytes: int
    seconds: float
    slowest_s: float


class Grammar(ABC):
    """A compiled schema."""

    enforced: bool | None = None
    """Whether the engine says that no answer can violate the schema; None: it does not say."""

    @property
    def enforced_alone(self) -> bool | None:
        """The same of the grammar, without what is counted beside it."""
        return self.enforced

    def follow(self, text: str) -> Followed:
        """Mask and step, byte by byte, as a decoder does; a byte that the mask forbids ends it."""
        step = self._start()
        clock = time.perf_counter
        began, taken, slowest = clock(), 0, 0.0
        previous = began
        for byte in (*text.encode(), END):
            accepted = step(byte)
            now = clock()
            slowest = max(slowest, now - previous)
            previous = now
            if not accepted:
                break
            taken += 1
        size = len(text.encode())
        return Followed(taken > size, min(taken, size), previous - began, slowest)

    def finally_valid(self, text: str) -> bool:
        """Whether an answer that the grammar accepts is given out. Engines alone look no further."""
        return True

    @abstractmethod
    def _start(self) -> Callable[[int], bool]:
        """A function that takes the next byte, or END, and says whether it may come there."""


class MaskEngine(ABC):
    """Compiles JSON schemas."""

    @abstractmethod
    def compile(self, schema: str) -> Grammar:
        """Raises Refused."""

    def rest(self) -> None:  # noqa: B027
        """Called between schemas."""


def _is_valid(schema: str, limits: SchemaLimits, text: str) -> bool:
    """Whether the final validation of the service lets an answer through; not if the schema is none."""
    from service.errors import GrammarError, OutputInvalid
    from service.structured_output.answers import AnswerValidator

    try:
        AnswerValidator(schema, limits).parse(text)
    except (OutputInvalid, GrammarError):
        return False
    return True


class _XGrammarGrammar(Grammar):
    def __init__(self, automaton: Any) -> None:
        self._automaton = automaton

    def _start(self) -> Callable[[int], bool]:
        import xgrammar

        matcher = xgrammar.GrammarMatcher(self._automaton)
        mask = xgrammar.allocate_token_bitmask(1, END + 1)
        words = mask.numpy()[0]

        def step(token: int) -> bool:
            matcher.fill_next_token_bitmask(mask)
            allowed = bool(words[token // 32] >> (token % 32) & 1)
            return allowed and matcher.accept_token(token)

        return step


class XGrammar(MaskEngine):
    """xgrammar by itself. any_whitespace: else the separators of ``json.dumps`` alone."""

    def __init__(self, any_whitespace: bool) -> None:
        import xgrammar

        table = [bytes([value]) for value in range(END)] + [b""]
        info = xgrammar.TokenizerInfo(
            table, xgrammar.VocabType.RAW, vocab_size=END + 1, stop_token_ids=[END]
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        form: dict[str, Any] = {"any_whitespace": False, "separators": (", ", ": ")}
        self._form = {"any_whitespace": True} if any_whitespace else form

    def compile(self, schema: str) -> Grammar:
        try:
            automaton = self._compiler.compile_json_schema(schema, strict_mode=False, **self._form)
        except (RuntimeError, ValueError) as error:
            raise Refused(str(error)) from None
        return _XGrammarGrammar(automaton)


class _LLGuidanceGrammar(Grammar):
    def __init__(self, tokenizer: Any, matcher: Any) -> None:
        self._end = tokenizer.eos_token
        self._words = (tokenizer.vocab_size + 31) // 32
        self._matcher = matcher

    def _start(self) -> Callable[[int], bool]:
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        matcher = self._matcher
        matcher.reset()
        mask = allocate_token_bitmask(1, self._words * 32)
        words = mask[0]

        def step(token: int) -> bool:
            token = self._end if token == END else token
            fill_next_token_bitmask(matcher, mask)
            allowed = bool(words[token // 32] >> (token % 32) & 1)
            return allowed and bool(matcher.consume_token(token))

        return step


class _ValidatedLLGuidanceGrammar(_LLGuidanceGrammar):
    def __init__(self, tokenizer: Any, matcher: Any, schema: str) -> None:
        super().__init__(tokenizer, matcher)
        self._schema = schema

    def finally_valid(self, text: str) -> bool:
        return _is_valid(self._schema, LARGE_LIMITS, text)


class LLGuidance(MaskEngine):
    """llguidance by itself, with the blanks that JSON allows.

    lenient: unknown formats and keywords that it does not support are ignored, which needs a validation
    of the answer behind it, as the service has; that one is used for `Grammar.finally_valid`.
    """

    def __init__(self, lenient: bool = False) -> None:
        import llguidance

        self._matcher = llguidance.LLMatcher
        self._tokenizer = llguidance.LLTokenizer("byte")
        self._lenient = lenient

    def compile(self, schema: str) -> Grammar:
        try:
            options = {"overrides": {"lenient": True}} if self._lenient else {}
            source = self._matcher.grammar_from_json_schema(schema, **options)
            matcher = self._matcher(self._tokenizer, source, log_level=0)
        except ValueError as error:
            raise Refused(str(error), "error") from None
        if matcher.is_error():
            raise Refused(matcher.get_error(), "error", located=True)
        if self._lenient:
            return _ValidatedLLGuidanceGrammar(self._tokenizer, matcher, schema)
        return _LLGuidanceGrammar(self._tokenizer, matcher)


class _OurGrammar(_XGrammarGrammar):
    """With the limits of strings beside the grammar, as the reference engine counts them."""

    def __init__(
        self,
        compiled: CompiledGrammar,
        compiler: GrammarCompiler,
        analysed: Analysed,
        limits: SchemaLimits,
    ) -> None:
        super().__init__(compiled.automaton)
        self._table, self._compiler = compiled.lengths, compiler
        self._analysed, self._limits = analysed, limits
        self.enforced = _is_enforced(analysed)

    @cached_property
    def enforced_alone(self) -> bool:
        from service.schema_compiler.api import analyse

        alone = replace(self._analysed.grammar, lengths_beside=False)
        return _is_enforced(analyse(alone, self._limits))

    def finally_valid(self, text: str) -> bool:
        return _is_valid(self._analysed.grammar.source, self._limits, text)

    def _start(self) -> Callable[[int], bool]:
        if self._table is None:
            return super()._start()
        import xgrammar

        from lmdeploy_ext.lengths.follower import Follower

        matcher, follower = xgrammar.GrammarMatcher(self._automaton), Follower(self._table)
        mask = xgrammar.allocate_token_bitmask(1, END + 1)
        words = mask.numpy()[0]
        narrow, table = self._compiler.vocabulary.narrow_inplace, self._compiler.table

        def step(token: int) -> bool:
            matcher.fill_next_token_bitmask(mask)
            narrow(words, follower)
            allowed = bool(words[token // 32] >> (token % 32) & 1)
            return allowed and matcher.accept_token(token) and follower.feed(table[token])

        return step


def _is_enforced(analysed: Analysed) -> bool:
    from service.schema_compiler.report import Enforcement

    return analysed.report.enforcement is Enforcement.ENFORCED


class Ours(MaskEngine):
    """Admission, analysis and compilation as in the service for an engine that counts lengths beside the
    grammar, then its final validation."""

    def __init__(self, limits: SchemaLimits, order: PropertyOrder) -> None:
        from service.engines.common.grammar import GrammarCompiler

        table = [bytes([value]) for value in range(END)] + [b""]
        self._compiler = GrammarCompiler(table, [END])
        self._limits, self._order = limits, order
        import service.schema_compiler.api  # noqa: F401

        gc.freeze()  # as the processes of the service do, which analyse
        gc.disable()
        self._answered = 0

    def following(self, grammar: Asked) -> Grammar:
        """An analysed grammar that follows texts."""
        return _XGrammarGrammar(self._compiler.compile(grammar).automaton)

    def rest(self) -> None:
        """Collect garbage, as these processes do."""
        self._answered += 1
        collect(self._answered)

    def compile(self, schema: str) -> Grammar:
        from service.errors import GrammarError
        from service.schema_compiler.api import analyse
        from service.schema_compiler.frontend.checked_schema import check_json_schema
        from service.types import GrammarKind

        try:
            check_json_schema(schema, self._limits)
            asked = Asked(
                GrammarKind.JSON_SCHEMA, schema, property_order=self._order, lengths_beside=True
            )
            analysed = analyse(asked, self._limits)
            compiled = self._compiler.compile(analysed.grammar)
        except GrammarError as error:
            located = bool(error.metadata.keys() & {"pointer", "actual", "limit", "limit_s"})
            raise Refused(error.message, error.reason, located) from None
        return _OurGrammar(compiled, self._compiler, analysed, self._limits)


OURS = "ours"
ANY_ORDER = "ours, any order"
DEFAULTS = "ours, default limits"
ENGINES: dict[str, Callable[[], MaskEngine]] = {
    "xgrammar, any whitespace": lambda: XGrammar(any_whitespace=True),
    "xgrammar, fixed separators": lambda: XGrammar(any_whitespace=False),
    "llguidance": LLGuidance,
    "llguidance, lenient": lambda: LLGuidance(lenient=True),
    OURS: lambda: Ours(LARGE_LIMITS, PropertyOrder.DECLARED),
    ANY_ORDER: lambda: Ours(LARGE_LIMITS, PropertyOrder.ANY),
    DEFAULTS: lambda: Ours(DEFAULT_LIMITS, PropertyOrder.DECLARED),
}


def schema_text(schema: object) -> str:
    """A schema as a client sends it."""
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def instance_text(value: object) -> str:
    """An instance as the service writes JSON."""
    return json.dumps(value, ensure_ascii=False)
