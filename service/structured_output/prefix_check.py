"""Finds violations of a schema while an answer is generated, so that nobody waits for the rest of it.

`PrefixCheck` reads the text in pieces and reports a violation as soon as no continuation can mend it:
a string that is longer than ``maxLength``, an item too many, a finished number out of bounds, a name
that is not allowed, two equal items. It reports nothing else: every answer that begins with the text
is invalid. What it does not understand, it leaves to the final validation.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from service.schema_compiler import jsontext
from service.schema_compiler.budget import Budget, BudgetExceeded, bounded
from service.schema_compiler.frontend.checked_schema import CheckedSchema, checked_schema
from service.schema_compiler.frontend.drafts import frozen
from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits
from service.schema_compiler.regex.matching import found
from service.schema_compiler.report import Enforcement, GrammarReport
from service.types import Capabilities, Enforcer, Grammar, PropertyOrder

MAX_PIECE = 64 * 1024
"""Characters of a piece that are read at once, on the event loop; a larger piece ends the check."""
MAX_CLAIMS = 500
"""Subschemas that are followed for one value; a schema with more is left to the final validation."""
_BUDGET_S, _BUDGET_STEPS = 0.05, 2_000_000
"""Bounds of the work on one piece."""
_SAVED_S, _PER_PIECE_S = 0.25, 0.0001
"""Processor time for one answer: at its start, and what each piece adds. Without time left, the final
validation decides: the event loop has other answers to serve."""
OF_VALUES = frozenset(
    {
        "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
        "exclusiveMaximum", "multipleOf", "uniqueItems", "minItems", "maxItems",
    }
)  # fmt: skip
"""Keywords that a grammar may leave out and still keep the names of properties apart."""

_KINDS = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
_TYPES = {"integer": "number"}
_PLAIN = re.compile(r'[^"\\]+')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_HIGH, _LOW = re.compile(r"\\u[dD][89abAB]"), re.compile(r"\\u[dD][c-fC-F]")
_SCALAR = re.compile(r"[-+0-9.eEa-z]+")
_SPACE = re.compile(r"[ \t\r\n]+")


@dataclass(frozen=True, slots=True)
class Violation:
    """A violation that no continuation mends: JSON pointer into the answer, and the keyword."""

    pointer: str
    keyword: str


@dataclass(slots=True, eq=False)
class _Claim:
    """A subschema that a value has to satisfy. of: what fails with it; None for the answer's schema."""

    schema: Any
    keywords: dict[str, Any]
    of: _Claim | _Choice | None
    failed: bool = False


@dataclass(slots=True, eq=False)
class _Choice:
    """``anyOf`` or ``oneOf``. left: branches that have not failed. possible: branches that allow the
    type of the value."""

    of: _Claim
    left: int
    possible: int


@dataclass(slots=True, eq=False)
class _Value:
    """A value that has begun. heads: the claims on it, each followed by those within it in ``claims``.
    seen: of an array its items so far, of an object its names. length: characters of a string."""

    kind: str
    heads: Sequence[_Claim] = ()
    claims: Sequence[_Claim] = ()
    step: str | int | None = None
    text: list[str] = field(default_factory=list)
    length: int = 0
    after_high: bool = False
    is_name: bool = False
    count: int = 0
    seen: set[Any] = field(default_factory=set)
    shortest: int | None = None


class _Found(Exception):
    """A violation of the schema of the answer."""


class _GiveUp(Exception):
    """The check cannot go on; the final validation decides."""


Heads: TypeAlias = list[tuple[Any, _Claim | None]]


def prefix_check(
    grammar: Grammar, report: GrammarReport, capabilities: Capabilities, limits: SchemaLimits
) -> PrefixCheck | None:
    """The check of one answer under the grammar of a JSON schema; None where it enforces every keyword."""
    if report.enforcement is Enforcement.ENFORCED:
        return None
    checked = {one.keyword for one in report.checked}
    masked = capabilities.enforcer is Enforcer.MASK and bool(checked) and checked <= OF_VALUES
    in_order = grammar.property_order is not PropertyOrder.ANY
    return PrefixCheck(grammar.source, limits, names_are_final=masked and in_order)


class PrefixCheck:
    """Checks one answer. Text may be cut anywhere between its pieces.

    names_are_final: a listed property does not come again in its object, as grammars in the declared
    order have it. Else a later member could take the place of a wrong one, so that the values of members
    are not checked.
    """

    def __init__(
        self, schema: str, limits: SchemaLimits = DEFAULT_LIMITS, *, names_are_final: bool = False
    ) -> None:
        self._checked: CheckedSchema = checked_schema(schema, limits)
        self._names_are_final = names_are_final
        self._stack: list[_Value] = []
        self._rest = ""
        self._expects = "value"
        self._violation: Violation | None = None
        subschemas = self._checked.subschemas
        # What a dynamic reference stands for depends on the way to it, which is not known here.
        dynamic = subschemas.embedded and any(key != "$ref" for _, key in subschemas.targets)
        self._active = not dynamic
        self._left_s = _SAVED_S

    @property
    def is_active(self) -> bool:
        """Whether further pieces are read."""
        return self._active

    def feed(self, piece: str) -> Violation | None:
        """Read the next piece of the text; the first violation that cannot be mended."""
        if not self._active or not piece:
            return self._violation
        if len(piece) > MAX_PIECE:
            self._active = False
            return None
        begun = time.thread_time()
        self._left_s = min(_SAVED_S, self._left_s + _PER_PIECE_S)
        try:
            with bounded(Budget(min(_BUDGET_S, self._left_s), _BUDGET_STEPS)):
                self._read(self._rest + piece)
        except _Found:
            self._active = False
        except (_GiveUp, BudgetExceeded, RecursionError, jsontext.JsonTextError):
            self._active = False
            self._violation = None
        self._left_s -= time.thread_time() - begun
        if self._left_s <= 0:
            self._active = False
        return self._violation

    # The text, token by token

    def _read(self, text: str) -> None:
        at, end = 0, len(text)
        self._rest = ""
        while at < end:
            top = self._stack[-1] if self._stack else None
            if top is not None and top.kind == "string":
                at = self._string(top, text, at)
            elif top is not None and top.kind == "scalar":
                at = self._scalar(top, text, at)
            elif (space := _SPACE.match(text, at)) is not None:
                at = space.end()
            else:
                at = self._token(top, text[at], at)
            if self._rest:
                return

    def _token(self, top: _Value | None, token: str, at: int) -> int:
        """A token outside strings and scalars; returns the place behind it, or that of a scalar."""
        if self._expects in ("value", "value or ]"):
            if token == "]" and self._expects == "value or ]":
                return self._close(at)
            return self._begin(token, at)
        if self._expects in ("name", "name or }"):
            if token == "}" and self._expects == "name or }":
                return self._close(at)
            if token != '"':
                raise _GiveUp
            self._stack.append(_Value("string", is_name=True))
            return at + 1
        if self._expects == ":" and token == ":":
            self._expects = "value"
            return at + 1
        if self._expects == "comma" and top is not None:
            if token == ",":
                self._expects = "value" if top.kind == "array" else "name"
                return at + 1
            if token == ("]" if top.kind == "array" else "}"):
                return self._close(at)
        raise _GiveUp

    def _begin(self, token: str, at: int) -> int:
        kind = _KINDS.get(token, "number")
        if kind == "number" and token not in "-0123456789":
            raise _GiveUp
        value = self._value(kind)
        if kind == "array":
            self._expects = "value or ]"
        elif kind == "object":
            self._expects = "name or }"
        self._stack.append(value)
        if kind in ("array", "object", "string"):
            return at + 1
        value.kind = "scalar"
        return at

    def _string(self, value: _Value, text: str, at: int) -> int:
        plain = _PLAIN.match(text, at)
        if plain is not None:
            value.text.append(plain.group())
            value.length += len(plain.group())
            value.after_high = False
            self._check_length(value)
            return plain.end()
        if text[at] == '"':
            word = jsontext.decode(f'"{"".join(value.text)}"')
            if value.is_name:
                self._stack.pop()
                self._named(word)
            else:
                self._complete(value, word)
            return at + 1
        escape = _ESCAPE.match(text, at)
        if escape is None:
            if len(text) - at >= 6:
                raise _GiveUp
            self._rest = text[at:]
            return len(text)
        written = escape.group()
        value.text.append(written)
        if not (value.after_high and _LOW.match(written)):  # a pair is one character
            value.length += 1
        value.after_high = _HIGH.match(written) is not None
        self._check_length(value)
        return escape.end()

    def _scalar(self, value: _Value, text: str, at: int) -> int:
        part = _SCALAR.match(text, at)
        if part is not None:
            value.text.append(part.group())
            return part.end()
        self._complete(value, jsontext.decode("".join(value.text), exact=True))
        return at

    def _close(self, at: int) -> int:
        self._stack.pop()
        self._ended()
        return at + 1

    def _ended(self) -> None:
        """A value is complete: what follows belongs to the one around it."""
        if not self._stack:
            raise _GiveUp  # the answer is complete
        self._expects = "comma"

    # What the schema says

    def _value(self, kind: str) -> _Value:
        """A value of this kind begins where the text is."""
        around = self._stack[-1] if self._stack else None
        if around is None:
            return self._claimed(kind, [(self._checked.subschemas.root, None)])
        if around.kind == "array":
            around.count += 1
            for claim in around.claims:
                most = claim.keywords.get("maxItems")
                if most is not None and around.count > most:
                    self._fail(claim, "maxItems")
            around.step = around.count - 1
            return self._claimed(kind, self._of_item(around))
        heads = self._of_member(around) if self._is_final(around) else []
        return self._claimed(kind, heads)

    def _of_item(self, around: _Value) -> Heads:
        index = around.count - 1
        heads: Heads = []
        for claim in around.claims:
            if claim.failed:
                continue
            keywords = claim.keywords
            prefix = keywords.get("prefixItems", ())
            items = keywords.get("items", True)
            if isinstance(items, list):
                prefix, items = items, keywords.get("additionalItems", True)
            heads.append((prefix[index] if index < len(prefix) else items, claim))
        return heads

    def _of_member(self, around: _Value) -> Heads:
        name = around.step
        assert isinstance(name, str)
        heads: Heads = []
        for claim in around.claims:
            keywords = claim.keywords
            matching = [
                schema
                for pattern, schema in keywords.get("patternProperties", {}).items()
                if found(pattern, name)
            ]
            if name in keywords.get("properties", {}):
                matching.append(keywords["properties"][name])
            elif not matching and "additionalProperties" in keywords:
                matching.append(keywords["additionalProperties"])
            heads += [(schema, claim) for schema in matching]
        return heads

    def _is_final(self, around: _Value) -> bool:
        """Whether no later member can take the place of this one: the name is listed, and not only in
        a branch beside which another one can be meant."""
        return self._names_are_final and any(
            around.step in claim.keywords.get("properties", {}) and _is_certain(claim)
            for claim in around.claims
        )

    def _named(self, name: str) -> None:
        """A name in an object is complete. Names stay in an object, however often they come."""
        around = self._stack[-1]
        around.step = name
        self._expects = ":"
        if name in around.seen:
            return
        around.seen.add(name)
        for claim in around.claims:
            keywords = claim.keywords
            most = keywords.get("maxProperties")
            if most is not None and len(around.seen) > most:
                self._fail(claim, "maxProperties")
            names = keywords.get("propertyNames", True)
            if names is not True and self._error(names, name) is not None:
                self._fail(claim, "propertyNames")
            if (
                keywords.get("additionalProperties") is False
                and name not in keywords.get("properties", {})
                and not any(found(one, name) for one in keywords.get("patternProperties", {}))
            ):
                self._fail(claim, "additionalProperties", step=name)

    def _check_length(self, value: _Value) -> None:
        if value.shortest is None:
            bounds = (one.keywords.get("maxLength") for one in value.claims if not one.failed)
            value.shortest = min((one for one in bounds if one is not None), default=-1)
        if value.shortest < 0 or value.length <= value.shortest:
            return
        value.shortest = None
        for claim in value.claims:
            most = claim.keywords.get("maxLength")
            if most is not None and value.length > most and not claim.failed:
                self._fail(claim, "maxLength")

    def _complete(self, value: _Value, word: Any) -> None:
        """The string, number, boolean or null on top is complete: the validator has the last word."""
        for head in value.heads:
            if not head.failed:
                keyword = self._error(head.schema, word)
                if keyword is not None:
                    self._fail(head, keyword)
        self._stack.pop()
        around = self._stack[-1] if self._stack else None
        if around is not None and around.kind == "array":
            key = frozen(word)
            if key in around.seen:
                for claim in around.claims:
                    if claim.keywords.get("uniqueItems") is True:
                        self._fail(claim, "uniqueItems")
            around.seen.add(key)
        self._ended()

    def _error(self, schema: Any, value: Any) -> str | None:
        """The keyword that a complete value violates."""
        if isinstance(schema, bool):
            return None if schema else "false"
        resolver = self._checked.subschemas.resolvers[id(schema)]
        validator = self._checked.validator.evolve(schema=schema, _resolver=resolver)
        error = next(validator.iter_errors(value), None)
        return None if error is None else str(error.validator or "false")

    def _claimed(self, kind: str, heads: Heads) -> _Value:
        """A value with the claims on it. Those that its type violates have failed."""
        value = _Value(kind)
        claims: list[_Claim] = []
        value.heads = [self._expanded(*head, claims) for head in heads]
        value.claims = claims
        self._stack.append(value)  # so that the place of a violation is this value
        for claim in claims:
            if not _allows(claim, kind):
                self._fail(claim, "type" if "type" in claim.keywords else "false", by_type=True)
        self._stack.pop()
        return value

    def _expanded(
        self,
        schema: Any,
        of: _Claim | _Choice | None,
        claims: list[_Claim],
    ) -> _Claim:
        if len(claims) >= MAX_CLAIMS:
            raise _GiveUp
        keywords = self._checked.draft.meaning(schema) if isinstance(schema, dict) else {}
        claim = _Claim(schema, keywords, of)
        claims.append(claim)
        if "$ref" in keywords:
            target = self._checked.subschemas.targets[id(schema), "$ref"]
            self._expanded(target, claim, claims)
        for one in keywords.get("allOf", ()):
            self._expanded(one, claim, claims)
        for keyword in ("anyOf", "oneOf"):
            branches = keywords.get(keyword, ())
            if branches:
                choice = _Choice(claim, len(branches), len(branches))
                for one in branches:
                    self._expanded(one, choice, claims)
        return claim

    def _fail(
        self, claim: _Claim, keyword: str, *, by_type: bool = False, step: str | None = None
    ) -> None:
        """A claim is violated, and with it what needs it. step: into the value on top."""
        failing: _Claim | _Choice | None = claim
        while failing is not None:
            if isinstance(failing, _Choice):
                failing.left -= 1
                failing.possible -= by_type
                if failing.left:
                    return
                failing = failing.of
            elif failing.failed:
                return
            else:
                failing.failed = True
                failing = failing.of
        path = [value.step for value in self._stack[:-1]] + ([] if step is None else [step])
        self._violation = Violation(jsontext.pointer(path), keyword)
        raise _Found


def _is_certain(claim: _Claim) -> bool:
    """Whether the claim holds for every valid answer: above it, no other branch allows the type."""
    above: _Claim | _Choice | None = claim
    while above is not None:
        if isinstance(above, _Choice) and above.possible > 1:
            return False
        above = above.of
    return True


def _allows(claim: _Claim, kind: str) -> bool:
    """Whether a value of this kind can satisfy the claim."""
    if isinstance(claim.schema, bool):
        return claim.schema
    types = claim.keywords.get("type")
    if types is None:
        return True
    names = [types] if isinstance(types, str) else types
    return any(_TYPES.get(name, name) == kind for name in names)
