"""JSON strings of any characters, of a length within bounds."""

from __future__ import annotations

from service.tasks.grammars.codepoints import ALL
from service.tasks.grammars.ebnf import Rules, literal
from service.tasks.grammars.emission import counted
from service.tasks.grammars.spellings import PLAIN, Json, character_class

_HEX = "[0-9a-fA-F]"
_BACKSLASH = literal("\\")


def canonical(low: int, high: int | None, rules: Rules) -> str:
    """From behind the first quote: low to high characters in the one spelling of ``json.dumps``."""
    spelling = Json(rules)
    if low == 0 and high is None:
        return spelling.anything()
    return f"{counted(ALL, low, high, rules, spelling)} {spelling.end}"


def in_any_spelling(low: int, high: int | None, rules: Rules) -> str:
    r"""The same in any spelling of JSON: models write ``\/`` and ``\u00e9``, too. A pair of
    surrogates is one character; none is alone."""
    return rules.once(("free string", low, high), lambda: _in_any_spelling(low, high, rules))


def _in_any_spelling(low: int, high: int | None, rules: Rules) -> str:
    second = f'{_BACKSLASH} "u" [dD] [c-fC-F] {_HEX} {_HEX}'
    code = rules.define(
        "json_code",
        f"[0-9a-cA-CefEF] {_HEX} {_HEX} {_HEX} | [dD] [0-7] {_HEX} {_HEX}"
        f" | [dD] [89abAB] {_HEX} {_HEX} {second}",
    )
    escape = rules.define(
        "json_any_escape", f'{_BACKSLASH} ["\\U0000005c/bfnrt] | {_BACKSLASH} "u" {code}'
    )
    plain = character_class(PLAIN)
    if low == 0 and high is None:
        name = rules.reserve("json_string")
        rules.fill(name, f"{Json.end} | {plain} {name} | {escape} {name}")
        return name
    one = rules.define("json_character", f"{plain} | {escape}")
    return f"{one}{{{low},{'' if high is None else high}}} {Json.end}" if high != 0 else Json.end
