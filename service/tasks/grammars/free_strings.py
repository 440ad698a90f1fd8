"""JSON strings of any characters, of a length within bounds."""

from __future__ import annotations

from collections.abc import Sequence

from service.tasks.grammars.codepoints import ALL
from service.tasks.grammars.ebnf import Rules, literal
from service.tasks.grammars.spellings import PLAIN, Json, character_class

COUNTED = 64
"""Characters up to which a grammar counts. Each is a state, for which a compiler goes through all
tokens: about 20 ms where there are 150,000."""
_HEX = "[0-9a-fA-F]"
_BACKSLASH = literal("\\")


def canonical(low: int, high: int | None, rules: Rules) -> str:
    """From behind the first quote: low to high characters in the one spelling of ``json.dumps``."""
    spelling = Json(rules)
    return counted(spelling.alternatives(ALL), low, high, spelling.anything(), rules)


def in_any_spelling(low: int, high: int | None, rules: Rules) -> str:
    r"""The same in any spelling of JSON: models write ``\/`` and ``\u00e9``, too. A pair of
    surrogates is one character; none is alone."""
    return counted(
        [character_class(PLAIN), _any_escape(rules)],
        low,
        high,
        rules.once("free string", lambda: _any_number(rules)),
        rules,
    )


def counted(one: Sequence[str], low: int, high: int | None, rest: str, rules: Rules) -> str:
    """From behind the first quote: low to high characters.

    one: the ways to write a character. rest: any number of them and the end. A rule for each number
    that is left: with one rule for a character, repeated, a matcher would have to follow each token
    of several characters out of it, at each step.
    """
    if high == 0:
        return Json.end
    if low == 0 and high is None:
        return rest
    key = ("counted", tuple(one), low, high)
    return rules.once(key, lambda: _counted(one, low, high, rest, rules))


def _counted(one: Sequence[str], low: int, high: int | None, rest: str, rules: Rules) -> str:
    below = counted(one, max(low - 1, 0), None if high is None else high - 1, rest, rules)
    ways = [f"{way} {below}" for way in one]
    return rules.define("json_counted", " | ".join(ways if low else [Json.end, *ways]))


def _any_number(rules: Rules) -> str:
    name, escape = rules.reserve("json_string"), _any_escape(rules)
    rules.fill(name, f"{Json.end} | {character_class(PLAIN)} {name} | {escape} {name}")
    return name


def _any_escape(rules: Rules) -> str:
    second = f'{_BACKSLASH} "u" [dD] [c-fC-F] {_HEX} {_HEX}'
    code = rules.define(
        "json_code",
        f"[0-9a-cA-CefEF] {_HEX} {_HEX} {_HEX} | [dD] [0-7] {_HEX} {_HEX}"
        f" | [dD] [89abAB] {_HEX} {_HEX} {second}",
    )
    return rules.define(
        "json_any_escape", f'{_BACKSLASH} ["\\U0000005c/bfnrt] | {_BACKSLASH} "u" {code}'
    )
