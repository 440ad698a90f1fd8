"""Properties of values: which have a text at all, and how much text a grammar for them can force."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from service.schema_compiler import budget
from service.schema_compiler.ir.values import (
    Alternative,
    Array,
    Constant,
    CountedArray,
    DistinctArray,
    Document,
    Number,
    Object,
    Property,
    PropertyValue,
    Reference,
    String,
    names_by_position,
    references,
)

Length = Callable[[Reference], int | None]
"""Characters of a short text of a value; None: it has no text, or it is not known yet."""
Values = Mapping[Reference, tuple[Alternative, ...]]

_LEVELS = 8192
"""Nesting of a value that contains itself: each level takes a token of the answer."""
_NUMBER_LENGTH = 400


def short_lengths(values: Values) -> dict[Reference, int]:
    """The values that have a text, with the length of a short one: a least fixpoint."""
    found: dict[Reference, int] = {}
    pending: list[Reference] = list(reversed(list(values)))
    changed = True
    while changed:
        changed = False
        waiting = []
        for reference in pending:
            budget.current().check()
            length = _shortest(values[reference], found.get)
            if length is None:
                waiting.append(reference)
            else:
                found[reference] = length
                changed = True
        pending = waiting
    return found


def _shortest(alternatives: tuple[Alternative, ...], length: Length) -> int | None:
    scalars = [n for n in map(_scalar_length, alternatives) if n is not None]
    if scalars:
        return min(scalars)
    found = [shortest(one, length) for one in alternatives]
    return min((n for n in found if n is not None), default=None)


def _scalar_length(alternative: Alternative) -> int | None:
    if isinstance(alternative, Constant):
        return len(alternative.text)
    if isinstance(alternative, String):
        return alternative.shortest
    return _NUMBER_LENGTH if isinstance(alternative, Number) else None


def shortest(alternative: Alternative, length: Length) -> int | None:
    """Characters of a short text, never less than a shortest one has; None where there is no text."""
    if isinstance(alternative, Object):
        return _shortest_object(alternative, length)
    if isinstance(alternative, Array):
        return _shortest_array(alternative, length)
    if isinstance(alternative, CountedArray):
        return _shortest_counted(alternative, length)
    if isinstance(alternative, DistinctArray):
        texts = alternative.texts
        high = len(texts) if alternative.maximum is None else min(alternative.maximum, len(texts))
        if alternative.minimum > high:
            return None
        return 2 + alternative.minimum * (2 + max(map(len, texts), default=0))
    return _scalar_length(alternative)


# Objects


def _shortest_object(one: Object, length: Length) -> int | None:
    total, count = 2, 0
    pairs: list[int] = []
    for prop in one.properties:
        own = [n for n in (length(value.value) for value in prop.values) if n is not None]
        if own:
            pairs.append(min(own) + len(prop.name) + 6)
            if prop.required:
                total += max(own) + len(prop.name) + 6
                count += 1
        elif prop.required:
            return None
    lengths = (length(value.value) for kind in one.additional for value in kind.values)
    additional = [n for n in lengths if n is not None]
    if one.maximum is not None and count > one.maximum:
        return None
    if not additional and len(pairs) < one.minimum:
        return None
    if one.obligations or one.minimum > count or one.maximum is not None:
        if not _has_object(replace(_with_values(one, length), lasting=0)):
            return None
        total += max(one.minimum - count, one.obligations, 0) * max(
            (*(n + 8 for n in additional), *pairs), default=0
        )
    return total


def _with_values(one: Object, length: Length) -> Object:
    """The object without values that have no text."""

    def kept(values: tuple[PropertyValue, ...]) -> tuple[PropertyValue, ...]:
        return tuple(value for value in values if length(value.value) is not None)

    several = [prop.values for prop in one.properties] + [kind.values for kind in one.additional]
    if all(values and len(kept(values)) == len(values) for values in several):
        return one

    properties = (replace(prop, values=kept(prop.values)) for prop in one.properties)
    additional = (replace(kind, values=kept(kind.values)) for kind in one.additional)
    return replace(
        one,
        properties=tuple(prop for prop in properties if prop.values or prop.required),
        additional=tuple(kind for kind in additional if kind.values),
    )


def _has_object(one: Object) -> bool:
    """Whether some object has the right number of properties and meets all obligations: forward, over
    the properties so far and the obligations that they have met."""
    additional = _additional_by_position(one)
    required = [i for i, prop in enumerate(one.properties) if prop.required]
    optional_from = required[-1] + 1 if required else 0
    everything = (1 << one.obligations) - 1
    cap = one.minimum if one.maximum is None else one.maximum

    def add(state: tuple[int, int], meets: int, lasting: int = 0) -> tuple[int, int] | None:
        if state[1] & lasting & ~meets:
            return None
        count, met = state[0] + 1, state[1] | meets
        if count > cap:
            return None if one.maximum is not None else (cap, met)
        return count, met

    def closed(states: set[tuple[int, int]], position: int) -> set[tuple[int, int]]:
        pending = list(states)
        while pending:
            state = pending.pop()
            for meets, lasting in additional[position]:
                after = add(state, meets, lasting)
                if after is not None and after not in states:
                    states.add(after)
                    pending.append(after)
        return states

    here = closed({(0, 0)}, 0)
    choosing = set(here)  # the property at this position may come next
    for position in range(len(one.properties) + 1):
        if position >= optional_from and any(
            count >= one.minimum and met == everything for count, met in here
        ):
            return True
        if position == len(one.properties):
            break
        prop: Property = one.properties[position]
        nexts = (add(state, value.meets) for state in choosing for value in prop.values)
        here = closed({after for after in nexts if after is not None}, position + 1)
        choosing = here | (set() if prop.required else choosing)
    return False


def _additional_by_position(one: Object) -> list[set[tuple[int, int]]]:
    """By position, the obligations that an additional property there meets, and those that it has to meet
    once they are met, one entry a value."""
    last = len(one.properties)
    found: list[set[tuple[int, int]]] = [set() for _ in range(last + 1)]
    for kind in one.additional:
        anywhere, extending = names_by_position(one.properties, kind.names)
        meets = {(value.meets, one.lasting & kind.can_meet) for value in kind.values}
        always = kind.names.apart is not None or bool(anywhere)
        names = False
        for position in range(last, -1, -1):
            if position < last and one.properties[position].required:
                names = False
            names = names or position in extending
            if always or names:
                found[position] |= meets
    return found


# Arrays


def _shortest_array(one: Array, length: Length) -> int | None:
    if one.maximum is not None and one.maximum < one.minimum:
        return None
    total = 2
    for reference in one.prefix[: one.minimum]:
        own = length(reference)
        if own is None:
            return None
        total += own + 2
    if one.minimum > len(one.prefix):
        own = None if one.rest is None else length(one.rest)
        if own is None:
            return None
        total += (own + 2) * (one.minimum - len(one.prefix))
    return total


def _shortest_counted(one: CountedArray, length: Length) -> int | None:
    if one.maximum is not None and one.maximum < one.minimum:
        return None
    if not _has_counted(one, length):
        return None
    lengths = (length(value.value) for values in one.items for value in values)
    known = [n for n in lengths if n is not None]
    least = sum(count.minimum for count in one.counts) + one.minimum + len(one.items) - 1
    return 2 + least * (2 + max(known, default=0))


def _has_counted(one: CountedArray, length: Length) -> bool:
    """Whether some array has the right number of items of each kind: forward, over the counts."""
    here: set[tuple[int, ...]] = {(0,) * len(one.counts)}
    for position in range(one.positions + 1):
        last = position == one.positions
        ends = position >= one.minimum
        pending = list(here)
        following: set[tuple[int, ...]] = set()
        while pending:
            counts = pending.pop()
            enough = zip(counts, one.counts, strict=True)
            if ends and all(n >= count.minimum for n, count in enough):
                return True
            if one.maximum is not None and position >= one.maximum:
                continue
            for value in one.items[min(position, len(one.items) - 1)]:
                after = counted(one, counts, value.counts_for)
                if length(value.value) is None or after is None:
                    continue
                if not last:
                    following.add(after)
                elif after not in here:
                    here.add(after)
                    pending.append(after)
        here = following
    return False


def counted(
    one: CountedArray, counts: tuple[int, ...], counts_for: Iterable[int]
) -> tuple[int, ...] | None:
    """The counts after an item; None where there are too many."""
    after = list(counts)
    for i in counts_for:
        after[i] += 1
        count = one.counts[i]
        if count.maximum is not None and after[i] > count.maximum:
            return None
        after[i] = min(after[i], count.cap)
    return tuple(after)


# Documents


def pruned(root: Reference, values: Values, lengths: Mapping[Reference, int]) -> Document:
    """The document without values and alternatives that have no text, and without values that its root
    does not reach. lengths: from ``short_lengths``; the root is in it."""
    found: dict[Reference, tuple[Alternative, ...]] = {}
    pending = [root]
    while pending:
        reference = pending.pop()
        if reference in found:
            continue
        kept = (_pruned(one, lengths) for one in values[reference])
        found[reference] = tuple(one for one in kept if one is not None)
        pending += (child for one in found[reference] for child in references(one))
    return Document(
        root, {reference: found[reference] for reference in values if reference in found}
    )


def can_last(one: Object) -> bool:
    """Whether a pruned object has a text in which the obligations that are to last do."""
    return _has_object(one)


def _pruned(one: Alternative, lengths: Mapping[Reference, int]) -> Alternative | None:
    if shortest(one, lengths.get) is None:
        return None
    if isinstance(one, Object):
        return _with_values(one, lengths.get)
    if isinstance(one, CountedArray):
        items = (tuple(v for v in values if v.value in lengths) for values in one.items)
        return replace(one, items=tuple(items))
    if isinstance(one, Array):
        return _pruned_array(one, lengths)
    return one


def _pruned_array(one: Array, lengths: Mapping[Reference, int]) -> Array:
    prefix = one.prefix if one.maximum is None else one.prefix[: one.maximum]
    known = next((i for i, ref in enumerate(prefix) if ref not in lengths), len(prefix))
    rest = one.rest if one.rest in lengths and known == len(prefix) else None
    if one.maximum is not None and one.maximum <= known:
        rest = None
    return Array(prefix[:known], rest, one.minimum, known if rest is None else one.maximum)


def order(document: Document) -> tuple[list[Reference], set[Reference]]:
    """The values, each after those that it contains, and the values that contain themselves."""
    values, root = document.values, document.root
    found: list[Reference] = []
    recursive: set[Reference] = set()
    on_path, seen = {root}, {root}
    stack = [(root, _children(values[root]))]
    while stack:
        reference, children = stack[-1]
        child = next(children, None)
        if child is None:
            stack.pop()
            on_path.discard(reference)
            found.append(reference)
        elif child in on_path:
            recursive.add(child)
        elif child not in seen:
            seen.add(child)
            on_path.add(child)
            stack.append((child, _children(values[child])))
    return found, recursive


def _children(alternatives: tuple[Alternative, ...]) -> Iterator[Reference]:
    return (child for one in alternatives for child in references(one))


def forced_text(document: Document, lengths: Mapping[Reference, int]) -> float:
    """A bound on the characters that a grammar for the document can force in a row. lengths: from
    ``short_lengths``."""
    in_order, recursive = order(document)
    deepest: dict[Reference, float] = {}
    for reference in in_order:
        alternatives = document.values[reference]
        own = max((shortest(one, lengths.get) or 0 for one in alternatives), default=0)
        below = max((deepest[c] for c in _children(alternatives) if c in deepest), default=0.0)
        deepest[reference] = float(own) + below
        if reference in recursive:
            deepest[reference] *= _LEVELS
    return deepest[document.root]
