r"""The dialect of regular expressions: ECMA-262 as JSON Schema wants it, as a syntax tree.

``\d`` and ``\w`` are ASCII, ``$`` is the very end, ``.`` is any character but a line terminator.
``\A``, ``\Z`` and ``\z``, which Python and Rust have and ECMA-262 has not, are the ends of the text.
Look-ahead at the start of the text is a further expression that is found there, or is not; elsewhere
it is a node of the tree. Look-behind and back-references are refused by name: nothing could match them
in linear time. Whether Unicode properties exist is left to the matcher (`service.schema_compiler.regex.matching`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

MAX_GROUPS = 100
"""Groups within groups; the parser recurses once for each."""


class PatternError(ValueError):
    """The pattern cannot be used; the message says why, for the caller."""


class PatternUnsupported(PatternError):
    """The pattern may be sound, but has something that cannot be matched here in linear time."""


@dataclass(frozen=True, slots=True)
class Property:
    r"""Characters by a Unicode property. text: as in the pattern, ``\p{…}`` or ``\P{…}``."""

    text: str


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of a set.

    members: ranges of code points, first and last; properties; sets. fold: without regard to case,
    which applies to the members before ``negated`` does, and in each set of sets anew.
    """

    members: tuple[tuple[int, int] | Property | Chars, ...]
    negated: bool = False
    fold: bool = False


@dataclass(frozen=True, slots=True)
class Sequence:
    """One item after the other; of none, the empty text."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """Any of at least two items."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """An item from low to high times; high: None for any number."""

    item: Node
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class Assertion:
    r"""A place between characters. kind: ``^``, ``$``, ``b`` for ``\b`` or ``B`` for ``\B``."""

    kind: str


@dataclass(frozen=True, slots=True)
class Ahead:
    """A place before what matches the item, or does not. It depends on nothing before that place."""

    item: Node
    negated: bool


Node: TypeAlias = Chars | Sequence | Choice | Repeat | Assertion | Ahead


@dataclass(frozen=True, slots=True)
class Expression:
    """A pattern in parts that have to hold for a text, each for itself.

    node: what is searched for, or matches the whole text. aheads: what else is searched for, from the
    start of the text, and whether it must not be found: the look-aheads.
    """

    node: Node
    aheads: tuple[tuple[Node, bool], ...] = ()

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All parts."""
        return self.node, *(ahead for ahead, _ in self.aheads)

    @property
    def looks_ahead(self) -> bool:
        """Whether there are look-aheads elsewhere than in ``aheads``."""
        return any(isinstance(part, Ahead) for node in self.nodes for part in parts(node))


def parts(node: Node) -> Iterator[Node]:
    """An expression and all expressions within."""
    pending = [node]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, Sequence | Choice):
            pending += node.items
        elif isinstance(node, Repeat | Ahead):
            pending.append(node.item)


def _depends_on_before(node: Node) -> tuple[bool, bool]:
    """Whether an expression looks at what is before it, and whether it can match nothing."""
    if isinstance(node, Assertion):
        return node.kind != "$", True
    if isinstance(node, Repeat):
        depends, empty = _depends_on_before(node.item)
        return depends, empty or node.low == 0
    if isinstance(node, Ahead):
        return _depends_on_before(node.item)[0], True
    if isinstance(node, Choice):
        found = [_depends_on_before(item) for item in node.items]
        return any(depends for depends, _ in found), any(empty for _, empty in found)
    if isinstance(node, Sequence):
        for item in node.items:
            depends, empty = _depends_on_before(item)
            if depends or not empty:
                return depends, False
        return False, True
    return False, False


START, END = Assertion("^"), Assertion("$")
_DIGIT = Chars(((0x30, 0x39),))
WORD = Chars(((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)))
_SPACE = Chars(
    tuple(
        (ord(first), ord(last))
        for first, last in (
            "\t\r", "  ", "\xa0\xa0", "\u1680\u1680", "\u2000\u200a", "\u2028\u2029",
            "\u202f\u202f", "\u205f\u205f", "\u3000\u3000", "\ufeff\ufeff",
        )
    )
)  # fmt: skip
_DOT = Chars(((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)), negated=True)
_CLASSES = {"d": _DIGIT, "w": WORD, "s": _SPACE}
_CLASSES |= {name.upper(): replace(chars, negated=True) for name, chars in _CLASSES.items()}
_CONTROLS = {"t": 0x09, "n": 0x0A, "r": 0x0D, "f": 0x0C, "v": 0x0B, "0": 0x00}
_NOT_BEFORE = "a look-ahead that begins with ^ or a word boundary is not supported"
_ENDS = {"A": "^", "Z": "$", "z": "$"}
_REPEAT = re.compile(r"\{(\d{1,9})(,(\d{1,9})?)?\}")
_BOUNDS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_GROUP = re.compile(r"\((?:\?(?:P?<[A-Za-z_][A-Za-z0-9_]*>|:|i:))?")
_PROPERTY = re.compile(r"[pP]\{[A-Za-z0-9_=&-]{1,60}\}")
_UNICODE = re.compile(r"u(?:\{([0-9A-Fa-f]{1,6})\}|([0-9A-Fa-f]{4}))")
_HEX = re.compile(r"x([0-9A-Fa-f]{2})")
_CONTROL = re.compile(r"c([A-Za-z])")
_LOW_SURROGATE = re.compile(r"\\u([dD][c-fC-F][0-9A-Fa-f]{2})")


def parse(source: str, *, whole: bool = False) -> Expression:
    """The trees of a pattern; with ``whole``, of one that matches from end to end. Raises
    `PatternError`."""
    found = _Leading(anchored=whole)
    node = found.taken_out(_Parser(source).parse())
    expression = Expression(node, tuple(found.aheads))
    for one in expression.nodes:
        for part in parts(one):
            if isinstance(part, Ahead) and _depends_on_before(part.item)[0]:
                raise PatternUnsupported(_NOT_BEFORE)
    return expression


class _Leading:
    """Takes look-aheads out of an expression where they look at the whole text.

    anchored: all that was seen so far holds at the start of the text only. over: and something of it
    takes a character, or may do so.
    """

    def __init__(self, *, anchored: bool) -> None:
        self.anchored = anchored
        self.over = False
        self.aheads: list[tuple[Node, bool]] = []

    def taken_out(self, node: Node) -> Node:
        if isinstance(node, Sequence):
            items = list(node.items)
            for at, item in enumerate(items):
                if self.over:
                    break
                items[at] = self.taken_out(item)
            return Sequence(tuple(items))
        if isinstance(node, Ahead) and self.anchored:
            self.aheads.append((Sequence((START, node.item)), node.negated))
            return Sequence(())
        self.over = node != START
        self.anchored = self.anchored or not self.over
        return node


class _Parser:
    """One pass over the pattern, left to right."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.at = 0
        self.groups = 0
        self.fold = False

    def parse(self) -> Node:
        node = self._alternatives()
        if self.at < len(self.source):
            raise self._error("unbalanced parenthesis")
        return node

    def _error(self, what: str, kind: type[PatternError] = PatternError) -> PatternError:
        return kind(f"{what} at character {self.at + 1}")

    def _alternatives(self) -> Node:
        branches: list[list[Node]] = [[]]
        while self.at < len(self.source) and self.source[self.at] != ")":
            if self.source[self.at] == "|":
                self.at += 1
                branches.append([])
            elif self.source.startswith("(?i)", self.at):  # to the end of the group
                self.at += 4
                self.fold = True
            else:
                branches[-1].append(self._repeated())
        items = tuple(
            branch[0] if len(branch) == 1 else Sequence(tuple(branch)) for branch in branches
        )
        return items[0] if len(items) == 1 else Choice(items)

    def _repeated(self) -> Node:
        char = self.source[self.at]
        if char in "*+?" or _REPEAT.match(self.source, self.at):
            raise self._error("nothing to repeat")
        if char in "^$":
            self.at += 1
            return Assertion(char)
        item = self._atom(char)
        repeat = _REPEAT.match(self.source, self.at)
        low: int
        high: int | None
        if repeat:
            low = int(repeat[1])
            high = low if repeat[2] is None else int(repeat[3]) if repeat[3] else None
            if high is not None and high < low:
                raise self._error("repeat bounds in the wrong order")
            self.at = repeat.end()
        elif self.source.startswith(("*", "+", "?"), self.at):
            low, high = _BOUNDS[self.source[self.at]]
            self.at += 1
        else:
            return item
        if self.source[self.at : self.at + 1] == "?":  # lazy: the same set of matching texts
            self.at += 1
        return Repeat(item, low, high)

    def _atom(self, char: str) -> Node:
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == "\\":
            kind = self.source[self.at + 1 : self.at + 2]
            if kind and kind in "bBAZz":
                self.at += 2
                return Assertion(_ENDS.get(kind, kind))
            member = self._escape()
            # A class of its own is not folded twice: [\w] and \w are the same set.
            return (
                replace(member, fold=self.fold) if isinstance(member, Chars) else self._one(member)
            )
        self.at += 1
        if char == ".":
            return replace(_DOT, fold=self.fold)
        return self._one((ord(char), ord(char)))

    def _one(self, member: tuple[int, int] | Property) -> Chars:
        return Chars((member,), fold=self.fold)

    def _group(self) -> Node:
        opening = _GROUP.match(self.source, self.at)
        assert opening is not None
        if self.source.startswith("(?", self.at) and opening[0] == "(":
            if self.source.startswith(("(?<=", "(?<!"), self.at):
                raise self._error("look-behind is not supported", PatternUnsupported)
            if self.source.startswith(("(?=", "(?!"), self.at):
                return self._ahead()
            raise self._error("unsupported kind of group", PatternUnsupported)
        self.at = opening.end()
        outside = self.fold
        self.fold = outside or opening[0] == "(?i:"
        node = self._inside()
        self.fold = outside
        return node

    def _ahead(self) -> Node:
        negated = self.source[self.at + 2] == "!"
        self.at += 3
        outside = self.fold
        node = self._inside()
        self.fold = outside
        return Ahead(node, negated)

    def _inside(self) -> Node:
        """What is in a group, and its end."""
        self.groups += 1
        if self.groups > MAX_GROUPS:
            raise self._error(f"groups nested more than {MAX_GROUPS} deep", PatternUnsupported)
        node = self._alternatives()
        if self.at >= len(self.source):
            raise self._error("missing closing parenthesis")
        self.at += 1
        self.groups -= 1
        return node

    def _class(self) -> Chars:
        self.at += 1
        negated = self.source.startswith("^", self.at)
        self.at += negated
        members: list[tuple[int, int] | Property | Chars] = []
        while not self.source.startswith("]", self.at):
            first = self._member()
            if self.source.startswith("-", self.at) and not self.source.startswith("-]", self.at):
                self.at += 1
                second = self._member()
                if isinstance(first, tuple) and isinstance(second, tuple):
                    if second[0] < first[0]:
                        raise self._error("range in the wrong order")
                    members.append((first[0], second[0]))
                else:  # beside a whole class, as in [\w-.], the hyphen is a hyphen
                    members += [first, (0x2D, 0x2D), second]
            else:
                members.append(first)
        self.at += 1
        return Chars(tuple(members), negated, self.fold)  # [] is nothing, [^] is anything

    def _member(self) -> tuple[int, int] | Property | Chars:
        if self.at >= len(self.source):
            raise self._error("missing closing bracket")
        char = self.source[self.at]
        if char == "\\":
            member = self._escape()
            return replace(member, fold=self.fold) if isinstance(member, Chars) else member
        self.at += 1
        return ord(char), ord(char)

    def _escape(self) -> tuple[int, int] | Property | Chars:
        """The escape at the cursor; ``b`` as in a class."""
        self.at += 1
        if self.at >= len(self.source):
            raise self._error("nothing after the backslash")
        char = self.source[self.at]
        if match := _PROPERTY.match(self.source, self.at):
            self.at = match.end()
            return Property("\\" + match[0])
        if match := _UNICODE.match(self.source, self.at):
            return self._code_point(match)
        if match := _HEX.match(self.source, self.at):
            self.at = match.end()
            return int(match[1], 16), int(match[1], 16)
        if match := _CONTROL.match(self.source, self.at):
            self.at = match.end()
            return ord(match[1]) % 32, ord(match[1]) % 32
        if char in "123456789k":
            raise self._error("back-references are not supported", PatternUnsupported)
        self.at += 1
        if char in _CLASSES:
            return _CLASSES[char]
        code = 0x08 if char == "b" else _CONTROLS.get(char, ord(char))
        if char.isascii() and char.isalnum() and code == ord(char):
            raise self._error(f"unknown escape \\{char}")
        return code, code

    def _code_point(self, match: re.Match[str]) -> tuple[int, int]:
        self.at = match.end()
        code = int(match[1] or match[2], 16)
        low = _LOW_SURROGATE.match(self.source, self.at)
        if 0xD800 <= code < 0xDC00 and low:
            self.at = low.end()
            code = 0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            raise self._error("not a character")
        return code, code
