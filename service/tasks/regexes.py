r"""Regular expressions of callers, matched in linear time.

The dialect is ECMA-262 as JSON Schema wants it: ``\d`` and ``\w`` are ASCII, ``$`` is the very
end, ``.`` is any character but a line terminator. The matcher is the Rust ``regex`` crate inside
pydantic, which is a dependency anyway: time linear in the text, memory bounded, no look-around
and no back-references, which are refused by name.
Tried and left: ``re`` backtracks; the ``regex`` package has a timeout for matching, but its
compiler takes unbounded memory on nested repeats; RE2 refuses repeats above 1000, which real
schemas have.

What remains is states times characters: one parse translates the pattern and counts its states,
patterns over ``MAX_STATES`` are refused, and each match takes its product from the budget first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from pydantic_core import SchemaError, SchemaValidator, core_schema

from service.tasks.budget import Budget

MAX_STATES = 20_000
"""Atoms of a pattern with its repeats written out."""
MAX_GROUPS = 100
"""Groups within groups; the parser recurses once for each."""

_SPACES = (
    r"\t\n\x0B\x0C\r \x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}"
    r"\x{202F}\x{205F}\x{3000}\x{FEFF}"
)
_CLASSES = {
    "d": "[0-9]",
    "D": "[^0-9]",
    "w": "[0-9A-Za-z_]",
    "W": "[^0-9A-Za-z_]",
    "s": rf"[{_SPACES}]",
    "S": rf"[^{_SPACES}]",
}
_CONTROLS = {"t": r"\t", "n": r"\n", "r": r"\r", "f": r"\x0C", "v": r"\x0B", "0": r"\x00"}
_DOT = r"[^\n\r\x{2028}\x{2029}]"
_REPEAT = re.compile(r"\{(\d{1,9})(,(\d{1,9})?)?\}")
_GROUP = re.compile(r"\((?:\?(?:P?<[A-Za-z_][A-Za-z0-9_]*>|:|i\)|i:))?")
_PROPERTY = re.compile(r"[pP]\{[A-Za-z0-9_=&-]{1,60}\}")
_UNICODE = re.compile(r"u(?:\{([0-9A-Fa-f]{1,6})\}|([0-9A-Fa-f]{4}))")
_LOW_SURROGATE = re.compile(r"\\u([dD][c-fC-F][0-9A-Fa-f]{2})")


class PatternError(ValueError):
    """The pattern cannot be used; the message says why, for the caller."""


class PatternUnsupported(PatternError):
    """The pattern may be sound, but has something that cannot be matched here in linear time."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled pattern. states: its size with the repeats written out."""

    states: int
    matcher: SchemaValidator

    def search(self, text: str, budget: Budget) -> bool:
        """Whether the pattern is found in the text. Raises ``BudgetExceeded`` instead of taking
        long."""
        budget.spend(self.states * (len(text) + 1))
        return self.matcher.isinstance_python(text)


@lru_cache(maxsize=256)
def compile_pattern(source: str, *, whole: bool = False, max_length: int = 1024) -> Pattern:
    """A pattern to be found anywhere, or with ``whole`` to match the whole text. Raises
    ``PatternError``."""
    if len(source) > max_length:
        raise PatternUnsupported(f"has {len(source)} characters, at most {max_length} are allowed")
    parser = _Parser(source)
    translated, states = parser.parse()
    if states > MAX_STATES:
        raise PatternUnsupported(
            f"is too large with its repeats written out: {states} states, "
            f"at most {MAX_STATES} are allowed"
        )
    pattern = rf"\A(?:{translated})\z" if whole else translated
    try:
        schema = core_schema.str_schema(pattern=pattern, regex_engine="rust-regex", strict=True)
        return Pattern(states, SchemaValidator(schema))
    except SchemaError as error:
        if "size limit" in str(error):
            what = "is too large with its repeats and classes written out"
            raise PatternUnsupported(what) from None
        raise PatternError("is not a valid regular expression") from None


class _Parser:
    """One pass over the pattern: translates it for the matcher and counts its states."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.at = 0
        self.groups = 0

    def parse(self) -> tuple[str, int]:
        text, states = self._alternatives()
        if self.at < len(self.source):
            raise self._error("unbalanced parenthesis")
        return text, max(states, 1)

    def _error(self, what: str, kind: type[PatternError] = PatternError) -> PatternError:
        return kind(f"{what} at character {self.at + 1}")

    def _alternatives(self) -> tuple[str, int]:
        parts: list[str] = []
        states = 0
        while self.at < len(self.source) and self.source[self.at] != ")":
            if self.source[self.at] == "|":
                self.at += 1
                parts.append("|")
                states += 1
                continue
            text, size = self._repeated()
            parts.append(text)
            states += size
        return "".join(parts), states

    def _repeated(self) -> tuple[str, int]:
        char = self.source[self.at]
        if char in "*+?" or _REPEAT.match(self.source, self.at):
            raise self._error("nothing to repeat")
        if char in "^$":
            self.at += 1
            return (r"\A" if char == "^" else r"\z"), 1
        text, size = self._atom(char)
        repeat = _REPEAT.match(self.source, self.at)
        if repeat:
            low = int(repeat[1])
            high = low if repeat[2] is None else int(repeat[3]) if repeat[3] else low + 1
            if high < low:
                raise self._error("repeat bounds in the wrong order")
            suffix, size = repeat[0], size * max(high, 1)
        elif self.source.startswith(("*", "+", "?"), self.at):
            suffix, size = self.source[self.at], size + 1
        else:
            return text, size
        self.at += len(suffix)
        if self.source[self.at : self.at + 1] == "?":  # lazy: the same set of matching texts
            self.at += 1
        # The matcher's own bound; what is larger is refused by the count of states anyway.
        return f"(?:{text}){suffix}" if size <= MAX_STATES else "", size

    def _atom(self, char: str) -> tuple[str, int]:
        if char == "(":
            return self._group()
        if char == "[":
            return self._class(), 1
        if char == "\\":
            return self._escape(in_class=False), 1
        self.at += 1
        return _DOT if char == "." else _literal(char), 1

    def _group(self) -> tuple[str, int]:
        opening = _GROUP.match(self.source, self.at)
        assert opening is not None
        if self.source.startswith("(?", self.at) and opening[0] == "(":
            if self.source.startswith(("(?=", "(?!", "(?<=", "(?<!"), self.at):
                raise self._error("look-around is not supported", PatternUnsupported)
            raise self._error("unsupported kind of group", PatternUnsupported)
        self.at = opening.end()
        if opening[0] == "(?i)":
            return "(?i)", 0
        self.groups += 1
        if self.groups > MAX_GROUPS:
            raise self._error(f"groups nested more than {MAX_GROUPS} deep", PatternUnsupported)
        text, states = self._alternatives()
        if self.at >= len(self.source):
            raise self._error("missing closing parenthesis")
        self.at += 1
        self.groups -= 1
        return ("(?i:" if opening[0] == "(?i:" else "(?:") + text + ")", states + 1

    def _class(self) -> str:
        self.at += 1
        negated = self.source.startswith("^", self.at)
        self.at += negated
        parts: list[str] = []
        while not self.source.startswith("]", self.at):
            first = self._member()
            if self.source.startswith("-", self.at) and not self.source.startswith("-]", self.at):
                self.at += 1
                second = self._member()
                # Beside a whole class, as in [\\w-.], the hyphen is a hyphen.
                hyphen = r"\x{2D}" if _is_set(first) or _is_set(second) else "-"
                parts += [first, hyphen, second]
            else:
                parts.append(first)
        self.at += 1
        if not parts:  # [] is nothing, [^] is anything
            return r"[\x00-\x{10FFFF}]" if negated else r"[^\x00-\x{10FFFF}]"
        return f"[{'^' if negated else ''}{''.join(parts)}]"

    def _member(self) -> str:
        if self.at >= len(self.source):
            raise self._error("missing closing bracket")
        char = self.source[self.at]
        if char == "\\":
            return self._escape(in_class=True)
        self.at += 1
        return _literal(char)

    def _escape(self, *, in_class: bool) -> str:
        """The escape at the cursor, in the matcher's spelling."""
        self.at += 1
        if self.at >= len(self.source):
            raise self._error("nothing after the backslash")
        char = self.source[self.at]
        if match := _PROPERTY.match(self.source, self.at):
            self.at = match.end()
            return "\\" + match[0]
        if match := _UNICODE.match(self.source, self.at):
            return self._code_point(match)
        if char == "x" and re.match(r"x[0-9A-Fa-f]{2}", self.source[self.at :]):
            self.at += 3
            return f"\\{self.source[self.at - 3 : self.at]}"
        if char == "c" and re.match(r"c[A-Za-z]", self.source[self.at :]):
            self.at += 2
            return f"\\x{ord(self.source[self.at - 1]) % 32:02X}"
        if char in "123456789k":
            raise self._error("back-references are not supported", PatternUnsupported)
        self.at += 1
        if char in _CLASSES:
            return _CLASSES[char]
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char in "bB":
            return r"\x08" if in_class and char == "b" else rf"(?-u:\{char})"
        if char.isascii() and char.isalnum():
            raise self._error(f"unknown escape \\{char}")
        return _literal(char)

    def _code_point(self, match: re.Match[str]) -> str:
        self.at = match.end()
        code = int(match[1] or match[2], 16)
        low = _LOW_SURROGATE.match(self.source, self.at)
        if 0xD800 <= code < 0xDC00 and low:
            self.at = low.end()
            code = 0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            raise self._error("not a character")
        return rf"\x{{{code:X}}}"


def _literal(char: str) -> str:
    """A character as itself, also inside a class, where the matcher knows set operators."""
    return char if char.isalnum() or char in " _" else rf"\x{{{ord(char):X}}}"


def _is_set(member: str) -> bool:
    """Whether a member of a class stands for many characters and so cannot end a range."""
    return member.startswith(("[", "\\p", "\\P"))
