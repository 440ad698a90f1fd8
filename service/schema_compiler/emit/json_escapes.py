"""How characters of a text are written: as they are, or inside a JSON string.

In a JSON string, a character that a set of texts tells apart has its canonical escape: the one of
``json.dumps`` without ``ensure_ascii``. Where any character may follow, it can have any form of JSON.
Classes of characters are never negated, so that no byte gets through that is in no UTF-8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from service.schema_compiler.emit.rules import Rules, literal
from service.schema_compiler.regex.codepoints import ALL, Ranges, difference, intersection, ranges

SHORT_ESCAPES = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\"}
"""The character after the backslash."""
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_]+")
"""Most names; nothing of them is escaped."""
_UNESCAPED = re.compile(r"[ !#-\[\]-~]+")
"""ASCII characters that stand for themselves."""
_SPECIAL: Ranges = ((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C))
BACKSLASH = literal("\\")
_HEX = "[0-9a-fA-F]"
PLAIN = difference(ALL, _SPECIAL)
"""What stands for itself in a JSON string."""


class RawText:
    """Characters as they are."""

    name = "raw"
    end = '""'
    """After the last character."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    def alternatives(self, characters: Ranges) -> list[str]:
        """Expressions of which each matches some of the characters, and together all."""
        return [character_class(characters)]

    def text(self, characters: str) -> str:
        """The expression for one text."""
        return literal(characters)

    def anything(self) -> str:
        """Any characters and the end."""
        return f"{character_class(ALL)}*"


class JsonEscapes:
    """Characters of a JSON string, and the quote at its end."""

    name = "json"
    end = literal('"')

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    def alternatives(self, characters: Ranges) -> list[str]:
        """See `RawText.alternatives`."""
        plain = _beside_all_special(characters)
        if plain is not None:
            return [plain, self._any_escape()]
        return list(_json_alternatives(characters))

    def among(self, characters: Sequence[str]) -> list[str]:
        """The alternatives of some characters, in their order."""
        if not characters:
            return []
        codes = [*map(ord, characters)]
        if _UNESCAPED.fullmatch("".join(characters)):
            return [_ascii_class(codes)]
        return self.alternatives(ranges(zip(codes, codes, strict=True)))

    def text(self, characters: str) -> str:
        """See `RawText.text`."""
        if _PLAIN_WORD.fullmatch(characters):
            return f'"{characters}"'
        return literal(json.dumps(characters, ensure_ascii=False)[1:-1])

    def anything(self) -> str:
        r"""See `RawText.anything`; in any form of JSON: models write ``\/`` and ``\u00e9``, too. A pair of
        surrogates is one character; none is alone."""
        return self._rules.once("free string", self._anything)

    def _anything(self) -> str:
        # All characters are in this rule: a matcher that left it for some of them would take half as
        # long again for each step, where there are 150,000 tokens. The rule is the same for values and
        # for the ends of names, because a compiler goes through all tokens for it.
        name = self._rules.reserve("json_string")
        escaped = f'{self._short(name)} | "/" {name} | "u" {self._code(name)}'
        escape = f"{BACKSLASH} {self._rules.define('json_escaped', escaped)}"
        self._rules.fill(name, f"{self.end} | {character_class(PLAIN)} {name} | {escape}")
        return name

    def others(self, characters: Ranges, rest: str) -> str:
        """The rule for any character but some, and the rest. It takes a compiler about ten states, so
        that there is one for each rest."""

        def make() -> str:
            others = difference(ALL, characters)
            plain = _beside_all_special(others)
            if plain is None:
                ways = [f"{one} {rest}" for one in _json_alternatives(others)]
            else:
                ways = [f"{plain} {rest}", self._escaped(rest)]
            return self._rules.define("json_others", " | ".join(ways))

        return self._rules.once(("others", characters, rest), make)

    def any_form_of_one(self) -> list[str]:
        """Expressions of which each matches some of the forms of a character, and together all."""
        short = f'{BACKSLASH} ["\\U0000005c/bfnrt]'
        return [
            character_class(PLAIN),
            self._rules.define("json_any_escape", f'{short} | {BACKSLASH} "u" {self._code("")}'),
        ]

    def _escaped(self, rest: str) -> str:
        r"""Any escape of a character that needs one, and the rest. The backslash is in no rule: a matcher would
        go through that rule at each character, and take a hundred times as long for the mask behind a
        backslash. Of the digits behind ``\u00``, the last is in the rule that all escapes before this rest have: a
        compiler follows all words that begin with a letter from there."""
        ways = f'{self._short(rest)} | "u00" [01] {self._digits(1, rest)}'
        return f"{BACKSLASH} {self._rules.define('json_escaped', ways)}"

    def _short(self, rest: str) -> str:
        """The rule for what follows the backslash of a canonical escape of one character, and the rest."""
        return self._rules.define(
            "json_short", f"{_class_of([*map(ord, SHORT_ESCAPES.values())])} {rest}"
        )

    def _code(self, rest: str) -> str:
        r"""The rule for what follows ``\u``, and the rest, which may be empty. The digits and the rest are a chain: a
        rule for the digits alone would take a compiler longer, which follows all tokens beyond its end."""
        two, three = self._digits(2, rest), self._digits(3, rest)
        second = f'{BACKSLASH} "u" [dD] [c-fC-F] {two}'
        return self._rules.define(
            "json_code",
            f"[0-9a-cA-CefEF] {three} | [dD] [0-7] {two} | [dD] [89abAB] {_HEX} {_HEX} {second}",
        )

    def _digits(self, count: int, rest: str) -> str:
        """The rule for so many hexadecimal digits and the rest."""
        below = self._digits(count - 1, rest) if count > 1 else rest
        return self._rules.define("json_digits", f"{_HEX} {below}".rstrip())

    def _any_escape(self) -> str:
        _, *escapes = _json_alternatives(ALL)
        return self._rules.define("json_escape", " | ".join(escapes))


@lru_cache(maxsize=4096)
def _beside_all_special(characters: Ranges) -> str | None:
    """The class of those that stand for themselves; None where not all of the others are there."""
    if intersection(characters, _SPECIAL) != _SPECIAL:
        return None
    return character_class(intersection(characters, PLAIN))


@lru_cache(maxsize=4096)
def _json_alternatives(characters: Ranges) -> tuple[str, ...]:
    found = []
    plain = intersection(characters, PLAIN)
    if plain:
        found.append(character_class(plain))
    special = intersection(characters, _SPECIAL)
    codes = [code for low, high in special for code in range(low, high + 1)]
    short = [ord(SHORT_ESCAPES[code]) for code in codes if code in SHORT_ESCAPES]
    if short:
        found.append(f"{BACKSLASH} {_class_of(short)}")
    for high in (0, 1):
        digits = [ord(f"{c % 16:x}") for c in codes if c not in SHORT_ESCAPES and c // 16 == high]
        if digits:
            found.append(f"{BACKSLASH} {literal(f'u00{high}')} {_class_of(digits)}")
    return tuple(found)


def _ascii_class(codes: list[int]) -> str:
    """`character_class` of ASCII characters in their order."""
    found = []
    first = last = codes[0]
    for code in codes[1:]:
        if code > last + 1:
            found.append(_range(first, last))
            first = code
        last = code
    return f"[{''.join(found)}{_range(first, last)}]"


def _class_of(codes: list[int]) -> str:
    return character_class(tuple((code, code) for code in sorted(codes)))


@lru_cache(maxsize=4096)
def character_class(characters: Ranges) -> str:
    """The expression for one character of a set that is not empty."""
    return "[" + "".join(_range(*pair) for one in characters for pair in encoded(*one)) + "]"


def encoded(low: int, high: int) -> list[tuple[int, int]]:
    """The range in pieces that every xgrammar reads as they are.

    Older ones, such as 0.2.1 in TurboMind's module, take overlong forms into a range over several
    lengths of UTF-8. From one of three or four bytes that ends in the middle of a block of 4,096
    they leave out what comes before in that block: where its first bytes are tokens of their own,
    generation can be stuck behind them.
    """
    cuts = {0x80, 0x800, 0x10000}
    if high >= 0x800 and high % 0x1000 != 0xFFF:
        cuts.add(high - high % 0x1000)
    bounds = [low, *sorted(cut for cut in cuts if low < cut <= high), high + 1]
    return [(first, after - 1) for first, after in pairwise(bounds)]


def _range(low: int, high: int) -> str:
    return _code(low) if low == high else f"{_code(low)}-{_code(high)}"


@lru_cache(maxsize=1024)
def _code(code: int) -> str:
    """A character inside a class."""
    return chr(code) if code < 0x80 and chr(code).isalnum() else f"\\U{code:08x}"
