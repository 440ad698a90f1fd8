r"""Regular expressions of callers, matched in linear time.

The dialect is ECMA-262 as JSON Schema wants it: ``\d`` and ``\w`` are ASCII, ``$`` is the very
end, ``.`` is any character but a line terminator. The matcher is the Rust ``regex`` crate inside
pydantic, which is a dependency anyway: time linear in the text, memory bounded, no look-around
and no back-references. Look-aheads at the start of the text are searched for, one by one; patterns
with others are matched by their deterministic automaton, where it is small enough. Look-behind and
back-references are refused by name.
Tried and left: ``re`` backtracks; the ``regex`` package has a timeout for matching, but its
compiler takes unbounded memory on nested repeats; RE2 refuses repeats above 1000, which real
schemas have.

What remains is states times characters: the states of a pattern are counted, patterns over
``MAX_STATES`` are refused, and each match takes its product from the budget first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from pydantic_core import SchemaError, SchemaValidator, core_schema

from service.schema_compiler.budget import Budget, current
from service.schema_compiler.regex.syntax import (
    Ahead,
    Assertion,
    Chars,
    Choice,
    Expression,
    Node,
    PatternError,
    PatternUnsupported,
    Property,
    Repeat,
    Sequence,
    parse,
)

__all__ = ["MAX_STATES", "Pattern", "PatternError", "PatternUnsupported", "compile_pattern"]

MAX_STATES = 20_000
"""Atoms of a pattern with its repeats written out."""

_PER_AUTOMATON = 1_000
"""Steps of an automaton that take as long as what else is done for one."""
_PER_CHARACTER = 20
"""States of the matcher that take as long as an automaton does."""
_ASSERTIONS = {"^": r"\A", "$": r"\z", "b": r"(?-u:\b)", "B": r"(?-u:\B)"}


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled pattern.

    states: its size with the repeats written out. is_found: in a text, but for its look-aheads at the
    start. aheads: these, and whether they must not be found. effort: steps that its automaton took.
    """

    states: int
    is_found: Callable[[str], bool]
    aheads: tuple[tuple[Callable[[str], bool], bool], ...] = ()
    effort: int = 0

    def search(self, text: str, budget: Budget) -> bool:
        """Whether the pattern is found in the text. Raises ``BudgetExceeded`` instead of taking
        long."""
        budget.spend(self.states * (len(text) + 1))
        return self.found(text)

    def found(self, text: str) -> bool:
        """The same for a text that was measured already."""
        return self.is_found(text) and all(
            is_found(text) != negated for is_found, negated in self.aheads
        )


@lru_cache(maxsize=256)
def compile_pattern(source: str, *, whole: bool = False, max_length: int = 1024) -> Pattern:
    """A pattern to be found anywhere, or with ``whole`` to match the whole text. Raises
    ``PatternError``."""
    if len(source) > max_length:
        raise PatternUnsupported(f"has {len(source)} characters, at most {max_length} are allowed")
    expression = parse(source, whole=whole)
    states = sum(max(_states(node), 1) for node in expression.nodes)
    if states > MAX_STATES:
        raise PatternUnsupported(
            f"is too large with its repeats written out: {states} states, "
            f"at most {MAX_STATES} are allowed"
        )
    if expression.looks_ahead:
        is_found, effort = _automaton(expression, whole)
        return Pattern(states + _PER_CHARACTER, is_found, effort=effort + _PER_AUTOMATON)
    spelled = _spelled(expression.node)
    is_found = matcher(rf"\A(?:{spelled})\z" if whole else spelled).isinstance_python
    aheads = tuple(
        (matcher(_spelled(node)).isinstance_python, negated) for node, negated in expression.aheads
    )
    return Pattern(states, is_found, aheads)


def _automaton(expression: Expression, whole: bool) -> tuple[Callable[[str], bool], int]:
    """Whether a text is accepted by the automaton of an expression, and the steps that it took.
    Raises ``PatternUnsupported`` where it would be too large."""
    # Automata need the sets of characters, which are asked of the matcher here.
    from service.schema_compiler.regex.dfa import DEAD, Effort, TooLarge
    from service.schema_compiler.regex.nfa import Alphabet, recognised

    effort = Effort()
    steps = effort.left
    try:
        alphabet = Alphabet(expression.nodes)
        found = recognised(expression, alphabet, effort, whole=whole)
    except TooLarge:
        raise PatternUnsupported(
            "has look-aheads, and is too large for an automaton, which they need"
        ) from None
    starts = sorted((low, n) for n, block in enumerate(found.blocks) for low, _ in block)
    lows, blocks = [low for low, _ in starts], [n for _, n in starts]
    edges, accepting = found.edges, found.accepting

    def accepts(text: str) -> bool:
        state = 0
        for character in text:
            state = edges[state][blocks[bisect_right(lows, ord(character)) - 1]]
            if state == DEAD:
                return False
        return accepting[state]

    return accepts, steps - effort.left


def matcher(spelling: str) -> SchemaValidator:
    """Finds a regular expression in the spelling of the Rust crate. Raises ``PatternError``."""
    try:
        schema = core_schema.str_schema(pattern=spelling, regex_engine="rust-regex", strict=True)
        return SchemaValidator(schema)
    except SchemaError as error:
        if "size limit" in str(error):
            what = "is too large with its repeats and classes written out"
            raise PatternUnsupported(what) from None
        raise PatternError("is not a valid regular expression") from None


def _states(node: Node) -> int:
    if isinstance(node, Sequence):
        return sum(map(_states, node.items))
    if isinstance(node, Choice):
        return sum(map(_states, node.items)) + len(node.items) - 1
    if isinstance(node, Repeat):
        times = node.low if node.high is None else node.high
        return max(_states(node.item), 1) * max(times, 1)
    return 1 + _states(node.item) if isinstance(node, Ahead) else 1


def _spelled(node: Node) -> str:
    """The node as the matcher writes it."""
    if isinstance(node, Choice):
        return "|".join(map(_spelled, node.items))
    if isinstance(node, Sequence):
        return "".join(map(_unit, node.items))
    if isinstance(node, Repeat):
        high = "" if node.high is None else node.high
        inner = _spelled(node.item)
        inner = inner if isinstance(node.item, Chars) else f"(?:{inner})"
        return f"{inner}{{{node.low},{high}}}"
    if isinstance(node, Assertion):
        return _ASSERTIONS[node.kind]
    assert isinstance(node, Chars), "look-aheads are matched by an automaton"
    return spelled_class(node)


def _unit(node: Node) -> str:
    return f"(?:{_spelled(node)})" if isinstance(node, Choice | Sequence) else _spelled(node)


def spelled_class(chars: Chars) -> str:
    """A set of characters as the matcher writes it."""
    return f"(?i:{_bracketed(chars)})" if chars.fold else _bracketed(chars)


def _bracketed(chars: Chars) -> str:
    members = "".join(map(_member, chars.members))
    if not members:
        return r"[\x00-\x{10FFFF}]" if chars.negated else r"[^\x00-\x{10FFFF}]"
    return f"[{'^' if chars.negated else ''}{members}]"


def _member(member: tuple[int, int] | Property | Chars) -> str:
    if isinstance(member, Property):
        return member.text
    if isinstance(member, Chars):
        return _bracketed(member)
    low, high = member
    return rf"\x{{{low:X}}}" if low == high else rf"\x{{{low:X}}}-\x{{{high:X}}}"


def found(pattern: str, text: str) -> bool:
    """Whether a pattern of a schema is found in a text. Takes from the budget of the call.

    Of any length: patterns of a request were measured when the schema was admitted, and those of
    metaschemas are short.
    """
    return compile_pattern(pattern, max_length=MAX_STATES).search(text, current())
