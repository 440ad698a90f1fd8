"""Strings of JSON that satisfy a conjunction of keywords, as EBNF."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.tasks.grammars import emission
from service.tasks.grammars.automata import Dfa, TooLarge, bounded, excluding, negation, product
from service.tasks.grammars.codepoints import ALL
from service.tasks.grammars.ebnf import Rules, literal
from service.tasks.grammars.exclusion import anything_but
from service.tasks.grammars.literals import Emitted, Literal
from service.tasks.grammars.nfa import Alphabet, determinised
from service.tasks.grammars.regex_syntax import Node, PatternError, parse
from service.tasks.grammars.spellings import PLAIN, Json, character_class

_TOO_LARGE = "is too large for a grammar together with the other constraints of its string"
_HEX = "[0-9a-fA-F]"


@dataclass(slots=True)
class _Wanted:
    """A conjunction, by kinds of literals."""

    low: int = 0
    high: int | None = None
    bounds: list[Literal] = field(default_factory=list)
    patterns: list[tuple[Literal, str]] = field(default_factory=list)
    excluded: list[Literal] = field(default_factory=list)
    dropped: list[tuple[Literal, str]] = field(default_factory=list)

    def add(self, one: Literal) -> None:
        """Sort a literal in."""
        if one.keyword in ("minLength", "maxLength"):
            self._bound(one)
        elif one.keyword == "pattern":
            self.patterns.append((one, one.value))
        elif one.keyword == "enum" and one.negated:
            self.excluded.append(one)
        else:
            self.dropped.append((one, "is not written into grammars of strings"))

    def _bound(self, one: Literal) -> None:
        self.bounds.append(one)
        bound = int(one.value)
        if one.keyword == "minLength" and not one.negated:
            self.low = max(self.low, bound)
        elif one.keyword == "minLength":
            self.high = bound - 1 if self.high is None else min(self.high, bound - 1)
        elif not one.negated:
            self.high = bound if self.high is None else min(self.high, bound)
        else:
            self.low = max(self.low, bound + 1)


def emit_string(literals: list[Literal], rules: Rules, *, key: bool = False) -> Emitted:
    """The expression for the JSON strings, quotes included, that satisfy all the literals.

    key: the string is a name in an object, so every character has its one canonical spelling.
    """
    wanted = _Wanted()
    for one in literals:
        wanted.add(one)
    if wanted.high is not None and wanted.high < wanted.low:
        return Emitted(None)
    names = {text for one in wanted.excluded for text in one.value if isinstance(text, str)}
    names = {
        n for n in names if wanted.low <= len(n) and (wanted.high is None or len(n) <= wanted.high)
    }
    if wanted.patterns:
        found = _patterned(wanted, names, rules)
    elif names:
        found = anything_but(names, wanted.low, wanted.high, rules)
    else:
        found = _free(wanted.low, wanted.high, rules, canonical=key)
    return Emitted(None if found is None else f"{literal(chr(34))} {found}", tuple(wanted.dropped))


def _free(low: int, high: int | None, rules: Rules, *, canonical: bool) -> str:
    spelling = Json(rules)
    if canonical:
        if low == 0 and high is None:
            return spelling.anything()
        return " ".join(
            filter(None, (emission.counted(ALL, low, high, rules, spelling), spelling.end))
        )
    return rules.once(("json_free", low, high), lambda: _loose(low, high, rules))


def _loose(low: int, high: int | None, rules: Rules) -> str:
    r"""Characters in any spelling of JSON: models write ``\/`` and ``\u00e9``, too."""
    backslash = literal("\\")
    low_half = rules.define("json_low", f'"u" [dD] [c-fC-F] {_HEX} {_HEX}')
    code = rules.define(
        "json_code",
        f"[0-9a-cA-CefEF] {_HEX} {_HEX} {_HEX} | [dD] ([0-7] {_HEX} {_HEX}"
        f" | [89abAB] {_HEX} {_HEX} {backslash} {low_half})",
    )
    escape = rules.define("json_any_escape", f'["\\U0000005c/bfnrt] | "u" {code}')
    plain = character_class(PLAIN)
    if low == 0 and high is None:
        name = rules.reserve("json_string")
        rules.fill(name, f"{Json.end} | {plain} {name} | {backslash} {escape} {name}")
        return name
    if high == 0:
        return Json.end
    one = rules.define("json_character", f"{plain} | {backslash} {escape}")
    return f"{one}{{{low},{'' if high is None else high}}} {Json.end}"


def _patterned(wanted: _Wanted, names: set[str], rules: Rules) -> str | None:
    spelling = Json(rules)
    nodes: list[tuple[Literal, Node]] = []
    for one, source in wanted.patterns:
        try:
            nodes.append((one, parse(source)))
        except PatternError as error:
            wanted.dropped.append((one, str(error)))
    alphabet = Alphabet((node for _, node in nodes), {c for name in names for c in name})
    automaton: Dfa | None = None
    for one, node in nodes:
        try:
            single = determinised(node, alphabet)
            single = negation(single) if one.negated else single
            automaton = single if automaton is None else product(automaton, single)
        except TooLarge:
            wanted.dropped.append((one, _TOO_LARGE))
    if automaton is None:
        return _free(wanted.low, wanted.high, rules, canonical=True)
    if names:
        try:
            automaton = product(
                automaton, excluding(alphabet.blocks, [alphabet.spelled(n) for n in names])
            )
        except TooLarge:
            wanted.dropped += [(one, _TOO_LARGE) for one in wanted.excluded]
    if wanted.bounds and not automaton.is_empty:
        try:
            automaton = bounded(automaton, wanted.low, wanted.high)
        except TooLarge:
            wanted.dropped += [(one, _TOO_LARGE) for one in wanted.bounds]
    return None if automaton.is_empty else emission.automaton(automaton, rules, spelling)
