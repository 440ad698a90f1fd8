"""Writing grammars in xgrammar's EBNF: rules by name, and literals.

An *expression* is EBNF text that can stand anywhere in the body of a rule; one with alternatives at
its top is in parentheses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable

ROOT = "root"
OWN = "\0"
"""In the body of a recursive rule, its own name."""


class Rules:
    """The rules of one grammar. Equal bodies share one rule."""

    def __init__(self) -> None:
        self._bodies: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._made: dict[Hashable, str] = {}
        self._recursive: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._bodies)

    def define(self, hint: str, body: str) -> str:
        """The name of a rule with this body, which is a rule that exists, or a new one.

        hint: how the name begins; letters, digits and underscores.
        """
        name = self._names.get(body)
        if name is None:
            name = self.reserve(hint)
            self.fill(name, body)
        return name

    def reserve(self, hint: str) -> str:
        """The name of a rule whose body comes later, by ``fill``: what recursion needs."""
        count = self._counts[hint] = self._counts.get(hint, -1) + 1
        name = f"{hint}_{count}" if count else hint
        self._bodies[name] = ""
        return name

    def fill(self, name: str, body: str) -> None:
        """Give a reserved rule its body."""
        self._bodies[name] = body
        self._names.setdefault(body, name)

    def define_recursive(self, hint: str, body: str) -> str:
        """The name of a rule with this body, in which ``OWN`` stands for the name; equal bodies share one
        rule."""
        name = self._recursive.get(body)
        if name is None:
            name = self._recursive[body] = self.reserve(hint)
            self.fill(name, body.replace(OWN, name))
        return name

    def once(self, key: Hashable, make: Callable[[], str]) -> str:
        """The expression that was made for this key in this grammar, or is now: rules that refer to
        each other are no two times the same text."""
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = make()
        return made

    def text(self, root: str) -> str:
        """The grammar as text. root: the expression that whole texts match."""
        lines = [f"{ROOT} ::= {root}"]
        lines += [f"{name} ::= {body}" for name, body in self._bodies.items()]
        return "\n".join(lines) + "\n"


def literal(text: str) -> str:
    """The expression that matches exactly this text; of no characters, the empty text."""
    return f'"{_UNSAFE.sub(_escaped, text)}"'


def sequence(*parts: str) -> str:
    """The expression for one after the other; of nothing, the empty text."""
    return " ".join(part for part in parts if part != '""') or '""'


def any_or_end(parts: Iterable[str], ends: bool) -> str:
    """The body of a rule for any of the parts, or with ``ends`` nothing. Not in brackets, of which
    compilers make more rules."""
    several = list(dict.fromkeys(parts))
    return " | ".join(['""', *several] if ends or not several else several)


def one_of(expressions: Iterable[str]) -> str:
    """The expression for any of at least one expression."""
    several = list(dict.fromkeys(expressions))
    return several[0] if len(several) == 1 else "(" + " | ".join(several) + ")"


_UNSAFE = re.compile(r"[^A-Za-z0-9 _\-.,:;{}()@/+*=<>!?&%$#'|~^]")


def _escaped(found: re.Match[str]) -> str:
    return f"\\U{ord(found[0]):08x}"


_NAME = re.compile(r'"[^"]*"|\[[^\]]*\]|([A-Za-z_]\w*)')


def pruned(text: str) -> str:
    """A grammar that was written here, a rule a line, without the rules that its root does not
    reach."""
    bodies = dict(line.split(" ::= ", 1) for line in text.splitlines())
    reached = {"", ROOT}
    pending = [ROOT]
    while pending:
        found = {*_NAME.findall(bodies[pending.pop()])} - reached
        reached |= found
        pending += found
    if len(reached) == len(bodies) + 1:
        return text
    return "".join([f"{name} ::= {body}\n" for name, body in bodies.items() if name in reached])
