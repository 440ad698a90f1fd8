"""Strings that satisfy a conjunction of keywords, and texts of regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from service.schema_compiler.ir.values import (
    AnyText,
    ExpressionText,
    OtherText,
    PrefixedText,
    TextSet,
)
from service.schema_compiler.lower.lowered import Lowered
from service.schema_compiler.lower.string_constraints import StringConstraints
from service.schema_compiler.lower.string_patterns import Excluded, PatternStrings
from service.schema_compiler.normalize.constraints import PREFIX, Literal
from service.schema_compiler.regex.character_sets import resolve
from service.schema_compiler.regex.nfa import sets_of
from service.schema_compiler.regex.syntax import PatternError, parse

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def lower_string(
    literals: Iterable[Literal], uncounted: frozenset[str] = frozenset()
) -> tuple[Lowered[TextSet], int]:
    """The strings that satisfy all the literals, and the steps that their automata took.

    uncounted: the keywords, of ``minLength``, ``maxLength``, ``pattern`` and ``format``, whose lengths are
    left to the decoder.
    """
    constraints = StringConstraints(uncounted=uncounted)
    for one in literals:
        constraints.add(one)
    low, high = constraints.low, constraints.high
    if high is not None and high < max(low, len(constraints.prefix) + bool(constraints.prefix)):
        return Lowered(None), 0
    texts, prefixes = (
        frozenset(
            text
            for one in constraints.excluded
            if one.keyword == keyword
            for text in one.value
            if isinstance(text, str) and not _LONE_SURROGATE.search(text)  # in no answer anyway
        )
        for keyword in ("enum", PREFIX)
    )
    texts = frozenset(
        text for text in texts if low <= len(text) and (high is None or len(text) <= high)
    )
    found, effort = _texts(constraints, Excluded(texts, prefixes))
    return Lowered(found, tuple(constraints.dropped)), effort


def lower_regex(source: str) -> Lowered[TextSet]:
    """The texts that a regular expression matches from end to end. Raises ``PatternError``. Where the
    literal ``pattern`` is dropped, any text is accepted."""
    constraints = StringConstraints(patterns=[(Literal("pattern", source), source)])
    found: TextSet | None = PatternStrings(constraints, Excluded(), whole=True).texts()
    return Lowered(AnyText() if constraints.dropped else found, tuple(constraints.dropped))


def _texts(constraints: StringConstraints, excluded: Excluded) -> tuple[TextSet | None, int]:
    if _asks_for_expressions_alone(constraints, excluded):
        return ExpressionText(may_be_empty=constraints.low == 0), 0
    _drop_unusable(constraints)
    prefix = constraints.prefix
    effort = 0
    if constraints.patterns:
        if prefix:
            pattern = f"^{_escaped(prefix)}[\\s\\S]"
            constraints.patterns.append((Literal("pattern", pattern), pattern))
        strings = PatternStrings(constraints, excluded, whole=False)
        found = strings.texts()
        effort = strings.effort
        if strings.is_lowered:
            return found, effort
    if constraints.uncounted:
        return _uncounted(constraints, excluded), effort
    return _beginning(prefix, _rest(excluded, prefix, *constraints.countable())), effort


def _asks_for_expressions_alone(constraints: StringConstraints, excluded: Excluded) -> bool:
    """Whether ``format: regex`` is all that is said of a string, but that it may not be empty."""
    formats = [
        (one.value, one.negated) for one, _ in constraints.patterns if one.keyword == "format"
    ]
    if len(constraints.patterns) != 1 or formats != [("regex", False)]:
        return False
    others = constraints.high is not None or excluded or constraints.prefix
    return constraints.low <= 1 and not others


def _uncounted(constraints: StringConstraints, excluded: Excluded) -> TextSet | None:
    """Strings without the bounds that the decoder keeps. A text that is excluded at the greatest length
    must not be begun to the end, as nothing could follow it."""
    prefix = constraints.prefix
    found = _rest(excluded, prefix, constraints.low, constraints.high)
    if found is None:
        return None
    rest = _rest(excluded, prefix, *constraints.countable())
    if constraints.high is not None and isinstance(rest, OtherText):
        longest = constraints.high - len(prefix)
        full = frozenset(text for text in rest.texts if text and len(text) == longest)
        rest = replace(rest, texts=rest.texts - full, prefixes=rest.prefixes | full)
    return _beginning(prefix, rest)


def _rest(
    excluded: Excluded, prefix: str, low: int, high: int | None
) -> AnyText | OtherText | None:
    """What comes behind a prefix in texts that are longer than it."""
    size = len(prefix)
    low, high = max(low - size, int(bool(prefix))), None if high is None else high - size
    return _other_than(excluded.behind(prefix), low, high)


def _beginning(prefix: str, rest: AnyText | OtherText | None) -> TextSet | None:
    return PrefixedText(prefix, rest) if prefix and rest is not None else rest


def _other_than(excluded: Excluded, low: int, high: int | None) -> AnyText | OtherText | None:
    if not excluded:
        return AnyText(low, high)
    is_long = high is None or high >= max(low, 1)
    # Of longer texts there are more than can be excluded.
    if not is_long and (low > 0 or "" in excluded.texts):
        return None
    return OtherText(low, high, excluded.texts, excluded.prefixes)


def _escaped(text: str) -> str:
    """A pattern that matches exactly this text."""
    return "".join(f"\\u{{{ord(character):X}}}" for character in text)


def _drop_unusable(constraints: StringConstraints) -> None:
    """Drop patterns that cannot be used."""
    usable = []
    for one, source in constraints.patterns:
        try:
            for chars in sets_of(*parse(source).nodes):
                resolve(chars)
        except PatternError as error:
            constraints.drop([one], str(error))
            continue
        usable.append((one, source))
    constraints.patterns = usable
