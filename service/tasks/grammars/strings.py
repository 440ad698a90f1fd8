"""Strings of JSON that satisfy a conjunction of keywords, and texts of regular expressions, as EBNF."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from service.tasks.grammars.charsets import resolve
from service.tasks.grammars.ebnf import Rules, literal
from service.tasks.grammars.exclusion import anything_but
from service.tasks.grammars.free_strings import canonical, in_any_spelling
from service.tasks.grammars.literals import Emitted, Literal
from service.tasks.grammars.nfa import sets_of
from service.tasks.grammars.patterned import Patterned
from service.tasks.grammars.regex_syntax import PatternError, parse
from service.tasks.grammars.spellings import Json, Raw
from service.tasks.grammars.wanted import Wanted

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
    if high is not None and high < low:
        return Emitted(None)
    names = frozenset(
        text
        for one in wanted.excluded
        for text in one.value
        if isinstance(text, str) and low <= len(text) and (high is None or len(text) <= high)
        if not _LONE_SURROGATE.search(text)  # in no answer anyway
    )
    rest = _rest(wanted, names, rules, canonical if key else in_any_spelling)
    return Emitted(None if rest is None else f"{_QUOTE} {rest}", tuple(wanted.dropped))


def emit_regex(source: str, rules: Rules) -> Emitted:
    """The expression for the texts that a regular expression matches from end to end.

    Raises ``PatternError``. Where a literal ``pattern`` is dropped, any text is accepted.
    """
    wanted = Wanted(patterns=[(Literal("pattern", source), source)])
    spelling = Raw(rules)
    found = Patterned(wanted, frozenset(), rules, spelling, whole=True).written()
    expression = spelling.anything() if wanted.dropped else found
    return Emitted(expression, tuple(wanted.dropped))


def _rest(
    wanted: Wanted,
    names: frozenset[str],
    rules: Rules,
    free: Callable[[int, int | None, Rules], str],
) -> str | None:
    """What comes after the first quote."""
    _drop_unusable(wanted)
    if wanted.patterns:
        writer = Patterned(wanted, names, rules, Json(rules), whole=False)
        found = writer.written()
        if writer.is_written:
            return found
    low, high = wanted.countable()
    return anything_but(names, low, high, rules) if names else free(low, high, rules)


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
