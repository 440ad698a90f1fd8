"""The automaton of a text, byte by byte as the text is written in JSON, for a decoder that counts.

The decoder reads it to learn how many characters the text needs at least to come to an end. What the text
may be is in the grammar.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from service.schema_compiler.emit.json_escapes import SHORT_ESCAPES
from service.schema_compiler.regex.codepoints import ranges
from service.schema_compiler.regex.dfa import DEAD, Dfa

MAX_EDGES = 20_000
"""Of one automaton; 8 bytes each."""
NONE = -1
Edges = tuple[tuple[int, int], ...]
"""Bytes, ascending, each with the node to which it and those before the next one lead, or NONE."""
_Pieces = Sequence[tuple[int, int, int]]
"""First and last code points and the node behind them, ascending."""


class TextNode(NamedTuple):
    """distance: characters that a text needs at least from here on; one that has begun does not count."""

    edges: Edges
    distance: int


class TooManyEdges(Exception):
    """The automaton takes too much room."""


def byte_spans(pairs: Iterable[tuple[int, int]]) -> Edges:
    """The edges of bytes, ascending, each with the node to which it alone leads."""
    found: list[tuple[int, int]] = []
    after = 0
    for byte, node in pairs:
        if byte != after and found:
            found.append((after, NONE))
        if byte != after or not found or found[-1][1] != node:
            found.append((byte, node))
        after = byte + 1
    if found and after < 256:
        found.append((after, NONE))
    return tuple(found)


def text_nodes(dfa: Dfa) -> list[TextNode]:
    """The nodes of a minimal automaton that accepts something; a text begins at the first. Raises
    `TooManyEdges`."""
    return _Nodes(dfa).all()


class _Nodes:
    def __init__(self, dfa: Dfa) -> None:
        self._dfa = dfa
        distances = dfa.distances()
        self._nodes = [TextNode((), distance) for distance in distances]
        self._known: dict[Edges, int] = {}
        self._edges = 0

    def all(self) -> list[TextNode]:
        for state, row in enumerate(self._dfa.edges):
            edges = self._spend(self._of_state(row))
            self._nodes[state] = TextNode(edges, self._nodes[state].distance)
        return self._nodes

    def _spend(self, edges: Edges) -> Edges:
        self._edges += len(edges)
        if self._edges > MAX_EDGES:
            raise TooManyEdges
        return edges

    def _node(self, pairs: Iterable[tuple[int, int]]) -> int:
        """The node inside a character from which bytes lead to nodes."""
        edges = byte_spans(pairs)
        found = self._known.get(edges)
        if found is None:
            found = self._known[edges] = len(self._nodes)
            distance = min(self._nodes[target].distance for _, target in edges if target != NONE)
            self._nodes.append(TextNode(self._spend(edges), distance))
        return found

    def _of_state(self, row: Sequence[int]) -> Edges:
        arrows: dict[int, list[tuple[int, int]]] = {}
        for block, target in zip(self._dfa.blocks, row, strict=True):
            if target != DEAD:
                arrows.setdefault(target, []).extend(block)
        pieces = sorted(
            (low, high, target) for target, pairs in arrows.items() for low, high in ranges(pairs)
        )
        escapes: dict[int, int] = {}
        edges: dict[int, int] = {}
        for low, high, target in pieces:
            for code in range(low, min(high, 0x7F) + 1):
                is_special = code < 0x20 or code in SHORT_ESCAPES
                (escapes if is_special else edges)[code] = target
        if escapes:
            edges[ord("\\")] = self._escaped(escapes)
        for lead in range(0xC2, 0xF5):
            below = 1 if lead < 0xE0 else 2 if lead < 0xF0 else 3
            first = (lead & (0x3F >> below)) << 6 * below
            least = (0x80, 0x800, 0x10000)[below - 1]  # shorter forms are in no UTF-8
            longer = [
                (max(low, least), high, target) for low, high, target in pieces if high >= least
            ]
            found = self._block(longer, first, below)
            if found is not None:
                edges[lead] = found
        return byte_spans(sorted(edges.items()))

    def _escaped(self, targets: dict[int, int]) -> int:
        """The node behind a backslash."""
        pairs: list[tuple[int, int]] = []
        digits: dict[int, list[tuple[int, int]]] = {}
        for code, target in targets.items():
            short = SHORT_ESCAPES.get(code)
            if short is not None:
                pairs.append((ord(short), target))
            else:
                digits.setdefault(code // 16, []).append((ord(f"{code % 16:x}"), target))
        if digits:
            tens = self._node(
                (ord("0") + ten, self._node(sorted(ones))) for ten, ones in sorted(digits.items())
            )
            for _ in range(2):
                tens = self._node([(ord("0"), tens)])
            pairs.append((ord("u"), tens))
        return self._node(sorted(pairs))

    def _block(self, pieces: _Pieces, first: int, below: int) -> int | None:
        """The node before the last bytes of the characters of a block, of which there are so many; None
        if the block has no character. pieces: sorted; some may be outside the block."""
        if below == 0:
            return next((target for low, high, target in pieces if low <= first <= high), None)
        last = first + (1 << 6 * below) - 1
        inside = [one for one in pieces if one[0] <= last and one[1] >= first]
        if not inside:
            return None
        size = 1 << 6 * (below - 1)
        if len(inside) == 1 and inside[0][0] <= first and last <= inside[0][1]:
            part = self._block(inside, first, below - 1)
            assert part is not None
            return self._node((0x80 + i, part) for i in range(64))
        parts = ((0x80 + i, self._block(inside, first + i * size, below - 1)) for i in range(64))
        found = [(byte, part) for byte, part in parts if part is not None]
        return self._node(found) if found else None
