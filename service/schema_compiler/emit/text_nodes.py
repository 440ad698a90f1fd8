"""The automaton of a text, byte by byte as the text is written in JSON, for a decoder that counts.

The decoder reads it to learn how many characters the text needs at least to come to an end. What the text
may be is in the grammar.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from service.schema_compiler.emit.json_escapes import SHORT_ESCAPES
from service.schema_compiler.regex.codepoints import Ranges, ranges
from service.schema_compiler.regex.dfa import DEAD, Dfa

MAX_EDGES = 100_000
"""Of all automata of a table; 8 bytes and about 2 µs each."""
NONE = -1
_MOST_STATES, _MOST_ROUNDS = 2_000, 16
"""Up to which states of an automaton are put into groups."""
Edges = tuple[tuple[int, int], ...]
"""Bytes, ascending, each with the node to which it and those before the next one lead, or NONE."""
_Run = tuple[int, int, int]
"""First and last bytes, or code points, and the node behind each of them."""


class TextNode(NamedTuple):
    """distance: characters that a text needs at least from here on; one that has begun does not count."""

    edges: Edges
    distance: int


class TooManyEdges(Exception):
    """The automaton takes too much room."""


def byte_spans(pairs: Iterable[tuple[int, int]]) -> Edges:
    """The edges of bytes, ascending, each with the node to which it alone leads."""
    return _edges((byte, byte, node) for byte, node in pairs)


def _edges(runs: Iterable[_Run]) -> Edges:
    found: list[tuple[int, int]] = []
    after = 0
    for first, last, node in runs:
        if first != after and found:
            found.append((after, NONE))
        if first != after or not found or found[-1][1] != node:
            found.append((first, node))
        after = last + 1
    if found and after < 256:
        found.append((after, NONE))
    return tuple(found)


def text_nodes(dfa: Dfa, room: int = MAX_EDGES) -> list[TextNode]:
    """The nodes of a minimal automaton that accepts something; a text begins at the first. room: the most
    edges that they may have together. Raises `TooManyEdges`."""
    distances = dfa.distances()
    groups = _alike(dfa, distances)
    rows = [[DEAD] * len(dfa.blocks) for _ in range(max(groups) + 1)]
    needed = [0] * len(rows)
    for state, group in enumerate(groups):
        needed[group] = distances[state]
        for block, target in enumerate(dfa.edges[state]):
            if target != DEAD:
                rows[group][block] = groups[target]
    return _Nodes(dfa, rows, needed, room).all()


def _alike(dfa: Dfa, distances: Sequence[int]) -> list[int]:
    """By state, the number of its group; the first state is in group 0. A text of the automaton needs as
    many characters from each state of a group, and as many behind each next byte that may follow. Bytes that
    may not follow do not count, because the grammar forbids them: so the states that count the characters of a
    host name are one group, for instance."""
    groups = _numbered(distances)
    if len(dfa.edges) > _MOST_STATES:
        return list(range(len(dfa.edges)))
    together = _beginning_alike(dfa.blocks)
    for _ in range(_MOST_ROUNDS):
        needed = dict(zip(groups, distances, strict=True))
        kinds: dict[int, list[tuple[int, list[int]]]] = {}
        found = []
        for state, row in enumerate(dfa.edges):
            leads = [DEAD if target == DEAD else groups[target] for target in row]
            same = kinds.setdefault(groups[state], [])
            fitting = next((one for one in same if _agree(leads, one[1], together, needed)), None)
            if fitting is None:
                fitting = state, leads
                same.append(fitting)
            fitting[1][:] = map(max, leads, fitting[1])
            found.append(fitting[0])
        finer = _numbered(found)
        if max(finer) == max(groups):
            return groups
        groups = finer
    return list(range(len(dfa.edges)))


def _beginning_alike(blocks: Sequence[Ranges]) -> list[tuple[int, ...]]:
    """The blocks of characters that can begin with the same byte: with a backslash, or a first byte in UTF-8."""
    alike: dict[int, list[int]] = {}
    for i, block in enumerate(blocks):
        first: set[int] = set()
        for low, high in block:
            if high > 0x7F:
                first.update(range(_first_byte(max(low, 0x80)), _first_byte(high) + 1))
            if low < 0x20 or any(low <= code <= high for code in SHORT_ESCAPES):
                first.add(ord("\\"))
        for byte in first:
            alike.setdefault(byte, []).append(i)
    return [*dict.fromkeys(map(tuple, alike.values()))]


def _first_byte(code: int) -> int:
    """Of a character beyond ASCII in UTF-8; surrogates are in none, but between those that are."""
    if code < 0x800:
        return 0xC0 | code >> 6
    return 0xE0 | code >> 12 if code < 0x10000 else 0xF0 | code >> 18


def _agree(
    one: Sequence[int],
    other: Sequence[int],
    together: Iterable[Sequence[int]],
    needed: Mapping[int, int],
) -> bool:
    """Whether two states lead to the same groups, where both lead on.

    together: see `_beginning_alike`. The first byte is allowed where one of the characters may follow. So where
    texts behind them need different numbers of characters, the same of them must lead on. needed: the
    characters that a text needs from a group.
    """
    if not all(a in (b, DEAD) or b == DEAD for a, b in zip(one, other, strict=True)):
        return False
    for blocks in together:
        ones, others = [one[i] for i in blocks], [other[i] for i in blocks]
        if ones == others or max(ones, default=DEAD) == DEAD or max(others, default=DEAD) == DEAD:
            continue
        if len({needed[lead] for lead in (*ones, *others) if lead != DEAD}) > 1:
            return False
    return True


def _numbered(values: Sequence[int]) -> list[int]:
    """The values by number, in the order in which they come."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return [numbers[value] for value in values]


class _Nodes:
    def __init__(
        self, dfa: Dfa, rows: Sequence[Sequence[int]], distances: Sequence[int], room: int
    ) -> None:
        self._dfa, self._rows = dfa, rows
        self._nodes = [TextNode((), distance) for distance in distances]
        self._known: dict[Edges, int] = {}
        self._wholes: dict[tuple[int, int], int] = {}
        self._room = room

    def all(self) -> list[TextNode]:
        for state, row in enumerate(self._rows):
            edges = self._spend(self._of_state(row))
            self._nodes[state] = TextNode(edges, self._nodes[state].distance)
        return self._nodes

    def _spend(self, edges: Edges) -> Edges:
        self._room -= len(edges)
        if self._room < 0:
            raise TooManyEdges
        return edges

    def _node(self, edges: Edges) -> int:
        """The node inside a character with these edges."""
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
        runs = [(byte, byte, target) for byte, target in sorted(edges.items())]
        for below, leads in (
            (1, range(0xC2, 0xE0)),
            (2, range(0xE0, 0xF0)),
            (3, range(0xF0, 0xF5)),
        ):
            least = (0x80, 0x800, 0x10000)[below - 1]  # shorter forms are in no UTF-8
            longer = [(max(low, least), high, to) for low, high, to in pieces if high >= least]
            first = (leads[0] & (0x3F >> below)) << 6 * below
            runs += self._blocks(longer, first, below, leads)
        return _edges(runs)

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
            ones = {ten: self._node(byte_spans(sorted(one))) for ten, one in digits.items()}
            tens = self._node(byte_spans((ord("0") + ten, ones[ten]) for ten in sorted(ones)))
            for _ in range(2):
                tens = self._node(byte_spans([(ord("0"), tens)]))
            pairs.append((ord("u"), tens))
        return self._node(byte_spans(sorted(pairs)))

    def _blocks(
        self, pieces: Sequence[_Run], first: int, below: int, leads: range
    ) -> Iterable[_Run]:
        """Of the blocks of characters that begin with these bytes, those that have some, with the nodes
        behind the bytes. first: character. below: the number of the bytes behind. pieces: ascending."""
        size = 1 << 6 * below
        at = count = 0
        while count < len(leads) and at < len(pieces):
            low = first + count * size
            begin, end, target = pieces[at]
            if end < low:
                at += 1
            elif begin > low + size - 1:
                count = (begin - first) // size
            elif begin <= low and (several := min((end + 1 - low) // size, len(leads) - count)):
                yield leads[count], leads[count + several - 1], self._whole(target, below)
                count += several
            else:
                after = at + 1
                while after < len(pieces) and pieces[after][0] < low + size:
                    after += 1
                parts = self._blocks(pieces[at:after], low, below - 1, range(0x80, 0xC0))
                yield leads[count], leads[count], self._node(_edges(parts))
                count += 1

    def _whole(self, target: int, below: int) -> int:
        """The node before the last bytes of characters all of which lead to one node."""
        if not below:
            return target
        found = self._wholes.get((target, below))
        if found is None:
            part = self._whole(target, below - 1)
            found = self._wholes[target, below] = self._node(_edges([(0x80, 0xBF, part)]))
        return found
