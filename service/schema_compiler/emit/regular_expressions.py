"""Regular expressions, as what an answer contains: strings with ``format: regex``.

The rules write a part of ECMA-262 that other languages read, too: groups, classes, repeats with
their bounds in order, and common escapes. What they leave out: groups within two others, names of groups,
look-ahead and look-behind, back-references, properties of Unicode, and ``{`` or ``[`` that stand for themselves
without a backslash. Each further place in groups would take a twentieth of a second to compile for a published
tokenizer.

There are rules for each place in groups, so that none of them comes back to the one that it was begun from: a
matcher would look at that one for each token that goes on behind the end of a group, which takes a thousand
times as long.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from service.schema_compiler.emit.json_escapes import BACKSLASH, JsonEscapes
from service.schema_compiler.emit.patterns import body_of
from service.schema_compiler.emit.rules import OWN, Rules, literal
from service.schema_compiler.regex.character_sets import resolve
from service.schema_compiler.regex.syntax import Chars, parse

_HEX = "[0-9A-Fa-f]"
_BEYOND = r"\u00A0-\u2027\u202A-\uD7FF\uE000-\u{10FFFF}"
_PLAIN = rf"[ !\"#%&',/0-9:;<=>@A-Z\]_`a-z}}~{_BEYOND}-]"
_MEMBER = rf"[ !\"#$%&'()*+,./0-9:;<=>?@A-Z_`a-z{{|}}~{_BEYOND}]"
_RANGE = "0-[0-9]|1-[1-9]|[2-8]-9|a-[b-z]|[b-y]-z|A-[B-Z]|[B-Y]-Z"
_CODE = rf"u(?:[0-9A-CEFa-cef]{_HEX}{{3}}|[Dd][0-7]{_HEX}{{2}})|x{_HEX}{{2}}"
_ESCAPE = r"[dDwWsStnrfv!-/:-@\[-`{-~]"
_ORDERED = "|".join([
    *(f"{low},[{low}-9]" for low in range(10)),
    *(f"{ten}0,{ten}[0-9]" for ten in range(1, 10)),
    *(f"{ten}[0-9],[{ten + 1}-9][0-9]" for ten in range(1, 9)),
    "[0-9],[1-9][0-9]{1,2}",
    "[1-9][0-9],[1-9][0-9]{2}",
])  # fmt: skip
_TIMES = f"(?:[0-9]{{1,3}},?|{_ORDERED})}}"


def regular_expression(rules: Rules, *, may_be_empty: bool) -> str:
    """The expression for one in a JSON string, and the quote at its end."""
    start = rules.once("regular expression", lambda: _Writer(rules).start())
    return f"({JsonEscapes.end} | {start})" if may_be_empty else start


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an expression is written. part: rule for the rest of the expression. atom: the same behind
    something that may be repeated. over: alternatives that end the place."""

    part: str
    atom: str
    over: list[str] = field(default_factory=list)


class _Writer:
    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._escapes = JsonEscapes(rules)
        self._times = rules.define("regex_times", self._body(_TIMES))
        self._range = rules.define("regex_range", self._body(_RANGE))
        self._code = rules.define("regex_code", self._body(_CODE))

    def start(self) -> str:
        """The rule for an expression that is not empty."""
        top = self._place([JsonEscapes.end])
        group, inner = self._place([]), self._place([])
        for place, behind in ((group, top), (inner, group)):
            place.over.append(f"{literal(')')} {behind.atom}")
        self._write(group, [inner])
        self._write(inner, [])
        return self._write(top, [group])

    def _place(self, over: list[str]) -> _Place:
        return _Place(self._rules.reserve("regex"), self._rules.reserve("regex_atom"), over)

    def _write(self, place: _Place, groups: list[_Place]) -> str:
        """Fill the rules of a place. groups: what a group that is opened here leads to. Returns the rule for
        what begins here."""
        define = self._rules.define
        part, atom = place.part, place.atom
        opened = [way for one in groups for way in (one.part, f'"?:" {one.part}')]
        escaped = define("regex_escape", f"[bB] {part} | {self._escaped(atom)}")
        lazy = define("regex_lazy", f'"?" {part} | {part}')
        beyond = define(
            "regex_beyond", " | ".join([f"[*+?] {lazy}", f'"{{" {self._times} {lazy}', *place.over])
        )
        begun = self._rules.define_recursive("regex_some", " | ".join([
            *self._going_on(_PLAIN, atom, beyond),
            f'"." {atom}',
            f'"|" {part}',
            f"[$^] {part}",
            f"{literal('[')} {self._class(atom)}",
            *([f'"(" {define("regex_group", " | ".join(opened))}'] if opened else []),
            f"{BACKSLASH} {BACKSLASH} {escaped}",
        ]))  # fmt: skip
        self._rules.fill(part, " | ".join([*place.over, begun]))
        self._rules.fill(atom, f"{beyond} | {begun}")
        return begun

    def _class(self, atom: str) -> str:
        """What is behind the bracket of a class."""
        define, rest = self._rules.define, self._rules.reserve("regex_members")
        end = f"{literal(']')} {atom}"
        beyond = define("regex_behind", f'{end} | "-" {end}')
        member = self._rules.define_recursive("regex_member", " | ".join([
            *self._going_on(_MEMBER, rest, beyond),
            f"{self._range} {rest}",
            f"{BACKSLASH} {BACKSLASH} {define('regex_escape', self._escaped(rest))}",
        ]))  # fmt: skip
        self._rules.fill(rest, f"{beyond} | {member}")
        inside = define("regex_class", f'"-" {end} | "-" {member} | {member}')
        return define("regex_class", f'"^" {inside} | {inside}')

    def _escaped(self, rest: str) -> str:
        """What is behind a backslash, and the rest."""
        ways = [f"{one} {rest}" for one in self._one(_ESCAPE)]
        return " | ".join([*ways, f"{self._code} {rest}"])

    def _going_on(self, pattern: str, rest: str, beyond: str) -> list[str]:
        """The alternatives of a rule for one of these characters and the rest, which is what is beyond, or the
        rule again. Most characters go on with the rule without the rest between: a compiler has a short cut for
        rules that go on with themselves. No text has two readings: a matcher would take time for each character
        that came before."""
        most, *others = self._one(pattern)
        return [f"{most} {OWN}", f"{most} {beyond}", *(f"{one} {rest}" for one in others)]

    def _one(self, pattern: str) -> list[str]:
        node = parse(pattern).node
        assert isinstance(node, Chars)
        return self._escapes.alternatives(resolve(node))

    def _body(self, pattern: str) -> str:
        return body_of(parse(pattern).node, self._rules, self._escapes)
