"""Strings of JSON that satisfy a conjunction of keywords, and texts of regular expressions, as EBNF."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from service.schema_compiler.emit.excluded_strings import anything_but
from service.schema_compiler.emit.free_strings import canonical, in_any_spelling
from service.schema_compiler.emit.json_escapes import Json, Raw
from service.schema_compiler.emit.rules import Rules, literal
from service.schema_compiler.lower.string_constraints import Wanted
from service.schema_compiler.lower.string_patterns import Excluded, Patterned
from service.schema_compiler.normalize.literals import BEGINNING, Emitted, Literal
from service.schema_compiler.regex.character_sets import resolve
from service.schema_compiler.regex.nfa import sets_of
from service.schema_compiler.regex.syntax import PatternError, parse

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_QUOTE = literal('"')


def emit_string(literals: Iterable[Literal], rules: Rules, *, key: bool = False) -> Emitted:
    """The expression for the JSON strings, quotes included, that satisfy all the literals.

    key: the string is a name in an object, so every character has its one canonical spelling.
    """
    wanted = Wanted()
    for one in literals:
        wanted.add(one)
    low, high = wanted.low, wanted.high
    if high is not None and high < max(low, len(wanted.beginning) + bool(wanted.beginning)):
        return Emitted(None)
    names, beginnings = (
        frozenset(
            text
            for one in wanted.excluded
            if one.keyword == keyword
            for text in one.value
            if isinstance(text, str) and not _LONE_SURROGATE.search(text)  # in no answer anyway
        )
        for keyword in ("enum", BEGINNING)
    )
    names = frozenset(
        text for text in names if low <= len(text) and (high is None or len(text) <= high)
    )
    free = canonical if key else in_any_spelling
    rest = _rest(wanted, Excluded(names, beginnings), rules, free)
    return Emitted(None if rest is None else f"{_QUOTE} {rest}", tuple(wanted.dropped))


def emit_regex(source: str, rules: Rules) -> Emitted:
    """The expression for the texts that a regular expression matches from end to end.

    Raises ``PatternError``. Where a literal ``pattern`` is dropped, any text is accepted.
    """
    wanted = Wanted(patterns=[(Literal("pattern", source), source)])
    spelling = Raw(rules)
    found = Patterned(wanted, Excluded(), rules, spelling, whole=True).written()
    expression = spelling.anything() if wanted.dropped else found
    return Emitted(expression, tuple(wanted.dropped))


def _rest(
    wanted: Wanted,
    excluded: Excluded,
    rules: Rules,
    free: Callable[[int, int | None, Rules], str],
) -> str | None:
    """What comes after the first quote."""
    _drop_unusable(wanted)
    beginning = wanted.beginning
    if wanted.patterns:
        if beginning:
            pattern = f"^{_escaped(beginning)}[\\s\\S]"
            wanted.patterns.append((Literal("pattern", pattern), pattern))
        writer = Patterned(wanted, excluded, rules, Json(rules), whole=False)
        found = writer.written()
        if writer.is_written:
            return found
    low, high = wanted.countable()
    if beginning:
        size = len(beginning)
        low, high = max(low - size, 1), None if high is None else high - size
        excluded = excluded.behind(beginning)
    rest = (
        anything_but(excluded.texts, low, high, rules, excluded.beginnings)
        if excluded
        else free(low, high, rules)
    )
    if rest is None or not beginning:
        return rest
    return f"{Json(rules).text(beginning)} {rest}"


def _escaped(text: str) -> str:
    """A pattern that matches just this text."""
    return "".join(f"\\u{{{ord(character):X}}}" for character in text)


def _drop_unusable(wanted: Wanted) -> None:
    """Drop patterns that cannot be used."""
    usable = []
    for one, source in wanted.patterns:
        try:
            for chars in sets_of(*parse(source).nodes):
                resolve(chars)
        except PatternError as error:
            wanted.drop([one], str(error))
            continue
        usable.append((one, source))
    wanted.patterns = usable
