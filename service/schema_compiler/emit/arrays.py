"""Arrays as EBNF: first items by position, then the others, with bounds on their number.

Where items of a kind are counted, the rules are written once for each position and count.
"""

from __future__ import annotations

from itertools import product

from service.schema_compiler.emit.objects import Value
from service.schema_compiler.emit.rules import Rules, literal
from service.schema_compiler.ir.sizes import counted
from service.schema_compiler.ir.values import Array, CountedArray, DistinctArray


def array(one: Array, rules: Rules, value: Value) -> str:
    """The expression for arrays whose items are not counted by kind."""
    items = [value(reference) for reference in one.prefix]
    tail = '""' if one.rest is None else _tail(one, value(one.rest))
    for position in range(len(items) - 1, -1, -1):
        comma = '", " ' if position else ""
        tail = f"{comma}{items[position]}" + ("" if tail == '""' else f" {tail}")
        if position >= one.minimum:
            tail = rules.define("items", f'"" | {tail}')
    return f'"[" {tail} "]"' if tail != '""' else '"[]"'


def _tail(one: Array, rest: str) -> str:
    """The items after the prefix, with the comma before them if there is a prefix."""
    before = len(one.prefix)
    least = max(one.minimum - before, 0)
    most = None if one.maximum is None else one.maximum - before
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


def distinct_array(one: DistinctArray, rules: Rules) -> str:
    """The expression for arrays of different items out of a few, in any order."""
    texts, low = one.texts, one.minimum
    most = len(texts) if one.maximum is None else min(one.maximum, len(texts))
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


def counted_array(one: CountedArray, rules: Rules, value: Value) -> str:
    """The expression for arrays whose items are counted by kind."""
    return _Counter(one, rules, value).run()


class _Counter:
    """Writes the rules from the last position to the first."""

    def __init__(self, one: CountedArray, rules: Rules, value: Value) -> None:
        self.array = one
        self.rules = rules
        self.items = [[(value(v.value), v.counts_for) for v in values] for values in one.items]

    def run(self) -> str:
        caps = [count.cap for count in self.array.counts]
        counts = list(product(*(range(most, -1, -1) for most in caps)))
        after: dict[tuple[int, ...], str | None] = {}
        for position in range(self.array.positions, -1, -1):
            last = position == self.array.positions
            found: dict[tuple[int, ...], str | None] = {}
            for count in counts:
                found[count] = self._after(position, count, found if last else after)
            after = found
        return f'"[" {after[(0,) * len(caps)]} "]"'

    def _after(
        self, position: int, count: tuple[int, ...], known: dict[tuple[int, ...], str | None]
    ) -> str | None:
        """What may follow ``position`` items. The last position stands for all beyond."""
        own = ""
        parts = ['""'] if self._ends(position, count) else []
        ends = bool(parts)
        comma = '", " ' if position else ""
        for text, counts_for in self._items_at(position):
            then = counted(self.array, count, counts_for)
            if then is None:
                continue
            if position == self.array.positions and then == count:
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

    def _items_at(self, position: int) -> list[tuple[str, tuple[int, ...]]]:
        if self.array.maximum is not None and position >= self.array.maximum:
            return []
        return self.items[min(position, len(self.items) - 1)]

    def _ends(self, position: int, count: tuple[int, ...]) -> bool:
        enough = zip(count, self.array.counts, strict=True)
        return position >= self.array.minimum and all(n >= one.minimum for n, one in enough)
