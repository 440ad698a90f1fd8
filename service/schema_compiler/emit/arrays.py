"""The rules of arrays: first items by place, then the rest, with bounds on their number.

Where items of a kind are counted, the rules are written once for each place and count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product

from service.schema_compiler.emit.rules import Rules, literal
from service.schema_compiler.normalize.constraints import Contains
from service.schema_compiler.normalize.nodes import State

Value = Callable[[State], str | None]
Length = Callable[[State], int | None]


@dataclass
class ArrayShape:
    """One alternative for arrays.

    prefix: states of the first items. rest: of the others. low, high: number of items; high None is
    any. counted: for each ``Contains`` its bounds and start. ways: for each place of the prefix, and
    last for the rest, states with the numbers of those ``Contains`` that they count for.
    distinct: texts of the items if they must differ, None where they need not.
    """

    prefix: list[State]
    rest: State
    low: int = 0
    high: int | None = None
    counted: list[Contains] = field(default_factory=list)
    ways: list[list[tuple[State, tuple[int, ...]]]] = field(default_factory=list)
    distinct: list[str] | None = None

    def children(self) -> Iterable[State]:
        """The states of items."""
        if self.distinct is not None:
            return
        if self.counted:
            for ways in self.ways:
                yield from (state for state, _ in ways)
        else:
            yield from self.prefix
            if self.high is None or self.high > len(self.prefix):
                yield self.rest

    def shortest(self, length: Length) -> int | None:
        """Characters of a shortest text, about and not below; None where there is none."""
        if self.high is not None and self.high < self.low:
            return None
        if self.distinct is not None:
            if self.low > len(self.distinct):
                return None
            return 2 + self.low * (2 + max(map(len, self.distinct), default=0))
        if self.counted:
            if self.write(Rules(), lambda s: None if length(s) is None else "x") is None:
                return None
            known = [n for ways in self.ways for n in (length(s) for s, _ in ways) if n is not None]
            least = sum(one.low for one in self.counted) + self.low + len(self.prefix)
            return 2 + least * (2 + max(known, default=0))
        total = 2
        for place in range(min(self.low, len(self.prefix))):
            own = length(self.prefix[place])
            if own is None:
                return None
            total += own + 2
        if self.low > len(self.prefix):
            own = length(self.rest)
            if own is None:
                return None
            total += (own + 2) * (self.low - len(self.prefix))
        return total

    def write(self, rules: Rules, value: Value) -> str | None:
        """The expression, or None where no array fits."""
        if self.distinct is not None:
            return _distinct(self.distinct, self.low, self.high, rules)
        if self.counted:
            return _Counter(self, rules, value).run()
        return self._plain(rules, value)

    def _plain(self, rules: Rules, value: Value) -> str | None:
        items = [value(state) for state in self.prefix]
        if self.high is not None:
            items = items[: self.high]
        if None in items:
            items = items[: items.index(None)]
            rest, high = None, len(items)
        else:
            rest, high = value(self.rest), -1 if self.high is None else self.high
            if rest is None:
                high = len(items) if high < 0 else min(high, len(items))
            elif high == len(items):
                rest = None
        if 0 <= high < self.low:
            return None
        tail = self._tail(rest, len(items), high)
        for place in range(len(items) - 1, -1, -1):
            comma = '", " ' if place else ""
            tail = f"{comma}{items[place]}" + ("" if tail == '""' else f" {tail}")
            if place >= self.low:
                tail = rules.define("items", f'"" | {tail}')
        return f'"[" {tail} "]"' if tail != '""' else '"[]"'

    def _tail(self, rest: str | None, before: int, high: int) -> str:
        """The items after the prefix, with the comma before them if there is a prefix."""
        if rest is None:
            return '""'
        least = max(self.low - before, 0)
        most = None if high < 0 else high - before
        if before:
            return _repeated(f'", " {rest}', least, most)
        more = _repeated(f'", " {rest}', max(least - 1, 0), None if most is None else most - 1)
        body = rest if more == '""' else f"{rest} {more}"
        return body if least else f'("" | {body})'


def _repeated(expression: str, least: int, most: int | None) -> str:
    if most == 0:
        return '""'
    if most is None:
        return f"({expression})*" if least == 0 else f"({expression}){{{least},}}"
    return f"({expression}){{{least},{most}}}"


def _distinct(texts: list[str], low: int, high: int | None, rules: Rules) -> str | None:
    """Arrays of different items out of a few, in any order."""
    most = len(texts) if high is None else min(high, len(texts))
    if low > most:
        return None
    after: dict[int, str] = {}
    sets = sorted(range(1 << len(texts)), key=lambda used: -used.bit_count())
    for used in sets:
        size = used.bit_count()
        if size > most:
            continue
        comma = ", " if size else ""
        parts = ['""'] if size >= low else []
        if size < most:
            for i, text in enumerate(texts):
                if not used >> i & 1:
                    follows = after[used | 1 << i]
                    parts.append(literal(comma + text) + ("" if follows == '""' else f" {follows}"))
        after[used] = parts[0] if len(parts) == 1 else rules.define("others", " | ".join(parts))
    return f'"[" {after[0]} "]"'


class _Counter:
    """Writes the rules from the last place to the first."""

    def __init__(self, shape: ArrayShape, rules: Rules, value: Value) -> None:
        self.shape = shape
        self.rules = rules
        self.caps = [cap(one) for one in shape.counted]
        self.places = shape_places(shape)
        self.ways = [
            [
                (text, hits)
                for text, hits in ((value(s), hits) for s, hits in ways)
                if text is not None
            ]
            for ways in shape.ways
        ]

    def run(self) -> str | None:
        counts = list(product(*(range(most, -1, -1) for most in self.caps)))
        after: dict[tuple[int, ...], str | None] = {}
        for place in range(self.places, -1, -1):
            found: dict[tuple[int, ...], str | None] = {}
            for count in counts:
                found[count] = self._after(place, count, found if place == self.places else after)
            after = found
        whole = after[(0,) * len(self.caps)]
        return None if whole is None else f'"[" {whole} "]"'

    def _after(
        self, place: int, count: tuple[int, ...], known: dict[tuple[int, ...], str | None]
    ) -> str | None:
        """What may follow ``place`` items. The last place stands for all beyond."""
        own = ""
        parts = ['""'] if self._ends(place, count) else []
        ends = bool(parts)
        comma = '", " ' if place else ""
        for text, hits in self._ways_at(place):
            then = self._add(count, hits)
            if then is None:
                continue
            if place == self.places and then == count:
                own = own or self.rules.reserve("others")
                parts.append(f"{comma}{text} {own}")
                continue
            follows = known.get(then)
            if follows is not None:
                parts.append(f"{comma}{text}" + ("" if follows == '""' else f" {follows}"))
                ends = True
        if not ends:
            return None
        body = " | ".join(dict.fromkeys(parts))
        if not own:
            return body if body == '""' else self.rules.define("others", body)
        self.rules.fill(own, body)
        return own

    def _ways_at(self, place: int) -> list[tuple[str, tuple[int, ...]]]:
        if self.shape.high is not None and place >= self.shape.high:
            return []
        return self.ways[min(place, len(self.ways) - 1)]

    def _ends(self, place: int, count: tuple[int, ...]) -> bool:
        enough = all(n >= one.low for n, one in zip(count, self.shape.counted, strict=True))
        return enough and place >= self.shape.low

    def _add(self, count: tuple[int, ...], hits: tuple[int, ...]) -> tuple[int, ...] | None:
        after = list(count)
        for i in hits:
            after[i] += 1
            high = self.shape.counted[i].high
            if high is not None and after[i] > high:
                return None
            after[i] = min(after[i], self.caps[i])
        return tuple(after)


def cap(one: Contains) -> int:
    return one.low if one.high is None else one.high


def shape_places(shape: ArrayShape) -> int:
    """The place from which on all places are alike."""
    if shape.high is not None:
        return shape.high
    return max(len(shape.ways) - 1, shape.low, 1)
