"""Deterministic automata over characters, made from regular expressions.

A JSON Schema pattern is searched for, not matched, and anchors and word boundaries may stand
anywhere in it. Everything here is bounded: `TooLarge` comes within some tens of milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from service.schema_compiler.regex.codepoints import Ranges, contains

MAX_STATES = 2_000
"""Of an automaton, on the way too: a grammar of that size still compiles in tens of milliseconds."""
MAX_EFFORT = 160_000
"""Edges and places that are looked at for one string: 50 to 100 ms."""

DEAD = -1
_ROUNDS = 100
_LOOKED_UP = 1_000_000
"""Bounds on a minimisation by rounds, before it goes on by splits: rounds, and next states that are
looked up in all of them, 30 to 50 ms."""
S = TypeVar("S", bound=Hashable)


class TooLarge(Exception):
    """The automaton would have too many states."""


class Effort:
    """What may still be done for one string."""

    def __init__(self, left: int = MAX_EFFORT) -> None:
        self.left = left

    def spend(self, steps: int) -> None:
        """Take steps; raises `TooLarge` when there are none left."""
        self.left -= steps
        if self.left < 0:
            raise TooLarge

    @contextmanager
    def half(self) -> Iterator[Effort]:
        """Half of what is left, for one part: what explodes leaves something for the others."""
        part = Effort(self.left // 2)
        before = part.left
        try:
            yield part
        finally:
            self.left -= before - max(part.left, 0)


@dataclass(frozen=True, slots=True)
class Dfa:
    """An automaton that starts in state 0.

    edges: for each state the next state by block of the alphabet, or DEAD. blocks: the alphabet;
    automata that are combined share one.
    """

    blocks: tuple[Ranges, ...]
    edges: tuple[tuple[int, ...], ...]
    accepting: tuple[bool, ...]

    def reaches(self, text: str) -> bool:
        """Whether some accepted text begins with this one; of a minimal automaton that accepts
        something."""
        state = 0
        for character in text:
            code = ord(character)
            row = self.edges[state]
            block = next((n for n, block in enumerate(self.blocks) if contains(block, code)), None)
            state = DEAD if block is None else row[block]
            if state == DEAD:
                return False
        return True

    @property
    def is_empty(self) -> bool:
        """Whether no text is accepted; of a minimal automaton."""
        return not any(self.accepting)

    def lengths(self) -> tuple[int, int | None]:
        """The least and the greatest length of accepted texts, None where there is none; of a
        minimal automaton that accepts something."""
        depth, layer, seen = 0, {0}, {0}
        shortest = -1
        while layer:
            if shortest < 0 and any(self.accepting[state] for state in layer):
                shortest = depth
            layer = {t for s in layer for t in self.edges[s] if t != DEAD} - seen
            seen |= layer
            depth += 1
        return shortest, self._longest()

    def _longest(self) -> int | None:
        below = [0] * len(self.edges)
        targets = [{t for t in row if t != DEAD} for row in self.edges]
        before: list[list[int]] = [[] for _ in self.edges]
        for state, following in enumerate(targets):
            for target in following:
                before[target].append(state)
        left = [len(following) for following in targets]
        ready = [state for state, count in enumerate(left) if not count]
        done = 0
        while ready:
            state = ready.pop()
            done += 1
            for previous in before[state]:
                below[previous] = max(below[previous], below[state] + 1)
                left[previous] -= 1
                if not left[previous]:
                    ready.append(previous)
        return below[0] if done == len(self.edges) else None

    def distances(self) -> list[int]:
        """By state, the characters that a text needs at least to be accepted; of a minimal automaton that
        accepts something."""
        found = [0 if accepting else -1 for accepting in self.accepting]
        before: list[set[int]] = [set() for _ in self.edges]
        for state, row in enumerate(self.edges):
            for target in row:
                if target != DEAD:
                    before[target].add(state)
        layer = [state for state, accepting in enumerate(self.accepting) if accepting]
        while layer:
            reached = []
            for state in layer:
                for previous in before[state]:
                    if found[previous] < 0:
                        found[previous] = found[state] + 1
                        reached.append(previous)
            layer = reached
        return found

    def ends_within(self, maximum: int) -> bool:
        """Whether each text of up to so many characters with which an accepted one begins can become an
        accepted one of at most so many."""
        longest = self._longest_to()
        return all(
            needed == 0 or (before is not None and before + needed <= maximum)
            for needed, before in zip(self.distances(), longest, strict=True)
        )

    def can_grow(self) -> bool:
        """Whether each accepted text becomes an accepted one by one more character."""
        return all(
            any(target != DEAD and self.accepting[target] for target in row)
            for row, accepting in zip(self.edges, self.accepting, strict=True)
            if accepting
        )

    def _longest_to(self) -> list[int | None]:
        """By state, the most characters that lead to it; None: any number."""
        targets = [{t for t in row if t != DEAD} for row in self.edges]
        left = [0] * len(targets)
        for following in targets:
            for target in following:
                left[target] += 1
        longest = [0] * len(targets)
        found: list[int | None] = [None] * len(targets)
        ready = [0] if left[0] == 0 else []
        while ready:
            state = ready.pop()
            found[state] = longest[state]
            for target in targets[state]:
                longest[target] = max(longest[target], longest[state] + 1)
                left[target] -= 1
                if not left[target]:
                    ready.append(target)
        return found


def explore(
    blocks: tuple[Ranges, ...],
    start: S,
    step: Callable[[S, int], S | None],
    accepts: Callable[[S], bool],
    effort: Effort,
    max_states: int = MAX_STATES,
) -> Dfa:
    """The minimal automaton of what is reachable from a start by a step for each block."""
    numbers: dict[S, int] = {start: 0}
    order, edges = [start], []
    for state in order:
        row = []
        for block in range(len(blocks)):
            target = step(state, block)
            if target is None:
                row.append(DEAD)
                continue
            number = numbers.setdefault(target, len(order))
            if number == len(order):
                order.append(target)
            row.append(number)
        edges.append(tuple(row))
        effort.spend(len(blocks))
        if len(order) > max_states:
            raise TooLarge
    return minimal(Dfa(blocks, tuple(edges), tuple(map(accepts, order))))


def negation(dfa: Dfa, effort: Effort) -> Dfa:
    """Of the texts that are not accepted; dfa: minimal.

    With a state for what leads nowhere, the negation of a minimal automaton is one. The states are
    numbered anew since the state that accepts whatever follows goes.
    """
    count, width = len(dfa.edges), len(dfa.blocks)
    every = (DEAD,) * width
    if dfa.is_empty:
        effort.spend(2 * width)
        return Dfa(dfa.blocks, ((0,) * width,), (True,))
    leaves = any(DEAD in row for row in dfa.edges)
    effort.spend((count + leaves) * width)
    whole = next(
        (s for s, row in enumerate(dfa.edges) if dfa.accepting[s] and row == (s,) * width), None
    )
    if whole == 0:
        return Dfa(dfa.blocks, (every,), (False,))
    numbers: dict[int, int] = {0: 0}
    order, edges = [0], []
    for state in order:
        row = []
        for target in (count,) * width if state == count else dfa.edges[state]:
            target = count if target == DEAD else target
            if target == whole:
                row.append(DEAD)
                continue
            number = numbers.setdefault(target, len(order))
            if number == len(order):
                order.append(target)
            row.append(number)
        edges.append(tuple(row))
    accepting = (state == count or not dfa.accepting[state] for state in order)
    return Dfa(dfa.blocks, tuple(edges), tuple(accepting))


def product(left: Dfa, right: Dfa, effort: Effort) -> Dfa:
    """Of the texts that both accept."""
    rows, others = left.edges, right.edges

    def step(pair: tuple[int, int], block: int) -> tuple[int, int] | None:
        one, other = rows[pair[0]][block], others[pair[1]][block]
        return None if one == DEAD or other == DEAD else (one, other)

    return explore(
        left.blocks,
        (0, 0),
        step,
        lambda pair: left.accepting[pair[0]] and right.accepting[pair[1]],
        effort,
    )


def bounded(dfa: Dfa, low: int, high: int | None, effort: Effort) -> Dfa:
    """Of the accepted texts whose length is within bounds."""
    top = low if high is None else high
    rows = dfa.edges

    def step(pair: tuple[int, int], block: int) -> tuple[int, int] | None:
        target, count = rows[pair[0]][block], pair[1] + 1
        if target == DEAD or (high is not None and count > high):
            return None
        return target, min(count, top)

    return explore(
        dfa.blocks, (0, 0), step, lambda pair: dfa.accepting[pair[0]] and pair[1] >= low, effort
    )


def minimal(dfa: Dfa) -> Dfa:
    """The least automaton of the same texts: without states from which nothing is accepted, and
    with equal states as one. States are numbered in breadth-first order."""
    live = _live(dfa)
    if not live[0]:
        return Dfa(dfa.blocks, ((DEAD,) * len(dfa.blocks),), (False,))
    count = len(dfa.edges)
    # Columns that are equal everywhere count once. The state `count` stands for DEAD.
    rows = [
        tuple(t if t != DEAD and live[t] else count for t in row) if live[state] else None
        for state, row in enumerate(dfa.edges)
    ]
    columns = list(dict.fromkeys(zip(*(row for row in rows if row is not None), strict=True)))
    states = [state for state in range(count) if live[state]]
    group = _groups(states, columns, [dfa.accepting[s] for s in states], count)
    numbers: dict[int, int] = {group[0]: 0}
    order = [0]
    edges = []
    for state in order:
        row = []
        for target in rows[state] or ():
            if target == count:
                row.append(DEAD)
                continue
            number = numbers.setdefault(group[target], len(order))
            if number == len(order):
                order.append(target)
            row.append(number)
        edges.append(tuple(row))
    return Dfa(dfa.blocks, tuple(edges), tuple(dfa.accepting[s] for s in order))


def _live(dfa: Dfa) -> list[bool]:
    """For each state whether something is accepted from it."""
    before: list[set[int]] = [set() for _ in dfa.edges]
    for state, row in enumerate(dfa.edges):
        for target in set(row):
            if target != DEAD:
                before[target].add(state)
    live = list(dfa.accepting)
    pending = [state for state, accepting in enumerate(live) if accepting]
    while pending:
        for previous in before[pending.pop()]:
            if not live[previous]:
                live[previous] = True
                pending.append(previous)
    return live


def _groups(
    states: list[int], columns: list[tuple[int, ...]], accepting: list[bool], dead: int
) -> dict[int, int]:
    """The class of equal states for each state. columns: the next states by state."""
    return _refined(states, columns, accepting, dead) or _split(states, columns, accepting, dead)


def _refined(
    states: list[int], columns: list[tuple[int, ...]], accepting: list[bool], dead: int
) -> dict[int, int] | None:
    """By rounds that tell all states apart by the classes of their next states; None after
    too many. Most automata take a few rounds, each of which is faster than one split (Moore)."""
    group = [0] * (dead + 1)
    classes = [1 + found for found in accepting]
    count = len(set(classes))
    for _ in range(min(_ROUNDS, _LOOKED_UP // (len(states) * len(columns) + 1))):
        for state, number in zip(states, classes, strict=True):
            group[state] = number
        following = (map(group.__getitem__, column) for column in columns)
        numbers: dict[tuple[int, ...], int] = {}
        classes = [
            numbers.setdefault(key, len(numbers) + 1)
            for key in zip(classes, *following, strict=True)
        ]
        if len(numbers) == count:
            return dict(zip(states, classes, strict=True))
        count = len(numbers)
    return None


def _split(
    states: list[int], columns: list[tuple[int, ...]], accepting: list[bool], dead: int
) -> dict[int, int]:
    """By splitting classes, each by the states that lead into another one (Hopcroft)."""
    inverse: list[dict[int, list[int]]] = []
    for column in columns:
        backwards: dict[int, list[int]] = {}
        for state, target in zip(states, column, strict=True):
            backwards.setdefault(target, []).append(state)
        inverse.append(backwards)
    parts: list[set[int]] = [{dead}]
    for wanted in (True, False):
        part = {s for s, found in zip(states, accepting, strict=True) if found is wanted}
        parts += [part] if part else []
    group = {state: number for number, part in enumerate(parts) for state in part}
    waiting = {(number, column) for number in range(len(parts)) for column in range(len(columns))}
    while waiting:
        number, letter = waiting.pop()
        touched: dict[int, list[int]] = {}
        for target in tuple(parts[number]):
            for state in inverse[letter].get(target, ()):
                touched.setdefault(group[state], []).append(state)
        for old, moved in touched.items():
            if len(moved) == len(parts[old]):
                continue
            parts[old].difference_update(moved)
            new = len(parts)
            parts.append(set(moved))
            for state in moved:
                group[state] = new
            smaller = new if len(moved) <= len(parts[old]) else old
            for other in range(len(columns)):
                waiting.add((new if (old, other) in waiting else smaller, other))
    return group


def excluding(
    blocks: tuple[Ranges, ...],
    texts: Sequence[Sequence[int]],
    effort: Effort,
    beginnings: Sequence[Sequence[int]] = (),
) -> Dfa:
    """Of all texts but some, and but those that begin with some, which are given as blocks of one
    character each."""
    nodes: list[dict[int, int]] = [{}]

    def node_of(text: Sequence[int]) -> int:
        at = 0
        for block in text:
            at = nodes[at].setdefault(block, len(nodes))
            if at == len(nodes):
                nodes.append({})
            if at > MAX_STATES:
                raise TooLarge
        return at

    ends = set(map(node_of, texts))
    dead = set(map(node_of, beginnings))
    free = len(nodes)

    def step(state: int, block: int) -> int | None:
        target = free if state == free else nodes[state].get(block, free)
        return None if target in dead else target

    return explore(blocks, 0, step, lambda s: s not in ends, effort)


def bits(mask: int) -> Iterator[int]:
    """The numbers of the bits that are set, ascending."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
