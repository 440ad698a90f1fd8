"""An estimate of the time that an engine takes to compile the patterns of strings.

A compiler follows the tokens of the model from each state of an automaton, so that the time depends on
the characters with which tokens begin that the state takes. Measured with xgrammar 0.2.8 and one thread
over the 151,643 tokens of Qwen's tokenizer: ``[a-z]{n}`` takes 1.3 ms a state, ``[a-zA-Z]{n}`` 2.3,
``[ -~]{n}`` 13, ``.{n}`` 22. States that go on with themselves are quick, as a compiler has a short cut
for them.
"""

from __future__ import annotations

from functools import lru_cache

from service.schema_compiler.ir.values import (
    AcceptedText,
    Document,
    MatchedText,
    Object,
    String,
    TextSet,
)
from service.schema_compiler.regex.character_sets import resolve
from service.schema_compiler.regex.codepoints import Ranges, intersection
from service.schema_compiler.regex.dfa import DEAD, Dfa
from service.schema_compiler.regex.syntax import Chars, Choice, Node, Repeat, Sequence

MAX_MS = 2_500.0
"""Of all patterns of a grammar: half of what a grammar may take by default."""
TOO_SLOW = "takes too long to compile together with the other patterns"
_BEGINNINGS: tuple[tuple[Ranges, int, float], ...] = (
    (((ord("a"), ord("z")),), 13, 2.0),
    (((ord("A"), ord("Z")),), 13, 1.5),
    (((0x20, 0x20),), 0, 4.0),
    (((0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E)), 16, 6.0),
    (((0x80, 0x10FFFF),), 10_000, 9.0),
)
"""Characters, of which a state takes more than so many, and the milliseconds for their tokens."""
_LOOP = 0.2
"""Share of the time of a character that leads back to the same state."""
_WRITTEN_OUT = 200


def compile_ms(texts: TextSet | None) -> float:
    """About the milliseconds that the patterns of a set of strings take; 0 for one without a pattern."""
    if isinstance(texts, AcceptedText):
        return automaton_ms(texts.automaton)
    return expression_ms(texts.expression) if isinstance(texts, MatchedText) else 0.0


def document_ms(document: Document) -> float:
    """The same of all patterns of a document; equal sets of strings are written once."""
    sets: dict[int, TextSet] = {}
    for alternatives in document.values.values():
        for one in alternatives:
            if isinstance(one, String):
                sets[id(one.texts)] = one.texts
            elif isinstance(one, Object):
                names = [kind.names for kind in one.additional]
                found = [
                    texts for kind in names for texts in (kind.apart, *kind.extending.values())
                ]
                sets.update((id(texts), texts) for texts in found if texts is not None)
    return sum(map(compile_ms, sets.values()))


def automaton_ms(automaton: Dfa) -> float:
    """About the milliseconds that the states of an automaton take."""
    taken = [
        [(i, n) for i, block in enumerate(automaton.blocks) if (n := _taken(block, of))]
        for of, _, _ in _BEGINNINGS
    ]
    total = 0.0
    for state, row in enumerate(automaton.edges):
        for counts, (_, few, ms) in zip(taken, _BEGINNINGS, strict=True):
            loop = on = 0
            for i, n in counts:
                target = row[i]
                if target == state:
                    loop += n
                elif target != DEAD:
                    on += n
            if loop + on > few:
                total += ms * (on + _LOOP * loop) / (on + loop)
    return total


def expression_ms(node: Node) -> float:
    """The same of an expression that is written as it stands."""
    if isinstance(node, Chars):
        return _one(resolve(node))
    if isinstance(node, Repeat):
        if not isinstance(node.item, Chars):
            return expression_ms(node.item)  # a group is a rule, which is compiled once
        times = node.low + _LOOP if node.high is None else node.high
        return expression_ms(node.item) * min(times, _WRITTEN_OUT)
    if isinstance(node, Sequence | Choice):
        return sum(map(expression_ms, node.items))
    return 0.0


@lru_cache(maxsize=1024)
def _one(characters: Ranges) -> float:
    return sum(ms for of, few, ms in _BEGINNINGS if _taken(characters, of) > few)


def _taken(characters: Ranges, of: Ranges) -> int:
    return sum(last - first + 1 for first, last in intersection(characters, of))
