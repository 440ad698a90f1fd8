"""JSON strings of any characters, of a length within bounds."""

from __future__ import annotations

from service.schema_compiler.emit.json_escapes import PLAIN, Json, character_class
from service.schema_compiler.emit.patterns import counted
from service.schema_compiler.emit.rules import Rules, literal
from service.schema_compiler.regex.codepoints import ALL

COUNTED = 64
"""Characters up to which a grammar counts. Each is a state, for which a compiler goes through all
tokens: about 20 ms where there are 150,000."""
_HEX = "[0-9a-fA-F]"
_BACKSLASH = literal("\\")


def canonical(low: int, high: int | None, rules: Rules) -> str:
    """From behind the first quote: low to high characters in the one spelling of ``json.dumps``."""
    spelling = Json(rules)
    return counted(spelling.alternatives(ALL), low, high, Json.end, spelling.anything(), rules)


def in_any_spelling(low: int, high: int | None, rules: Rules) -> str:
    r"""The same in any spelling of JSON: models write ``\/`` and ``\u00e9``, too. A pair of
    surrogates is one character; none is alone."""
    return counted(
        [character_class(PLAIN), _any_escape(rules)],
        low,
        high,
        Json.end,
        rules.once("free string", lambda: _any_number(rules)),
        rules,
    )


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
