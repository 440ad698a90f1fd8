"""What a grammar enforces of what the caller asked for, as data."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from functools import cached_property

from service.types import Capabilities, Enforcer, Grammar


class Enforcement(enum.Enum):
    """How a keyword of a schema, or a schema as a whole, is kept."""

    ENFORCED = "enforced"
    """By the grammar: a complete answer cannot violate it."""
    CHECKED = "checked"
    """By the final validation: a violation is an error, never an answer."""
    ANNOTATION = "annotation"
    """It says nothing about a value."""


@dataclass(frozen=True, slots=True)
class KeywordReport:
    """One keyword at one place.

    pointer: JSON pointer (RFC 6901) to the keyword in the schema as sent.
    why: for CHECKED, what the grammar cannot do there and what would help. For ENFORCED, what the
    grammar allows less of than the schema, such as the order of properties; mostly empty.
    """

    pointer: str
    keyword: str
    enforcement: Enforcement
    why: str = ""


class WarningKind(enum.Enum):
    """Why a schema may not do what its author means."""

    CONSTRAINS_NOTHING = "constrains_nothing"
    """Every JSON value is valid."""
    MISSPELT_KEYWORD = "misspelt_keyword"
    """A name that is close to a keyword, with a value that this keyword could have."""
    NULLABLE = "nullable"
    """OpenAPI's ``nullable``, which allows nothing in JSON Schema."""
    OTHER_DRAFT = "other_draft"
    """A keyword, or a form of it, that is read as another draft has it."""
    IGNORED = "ignored"
    """A keyword that says nothing where it stands."""
    UNUSED = "unused"
    """A part that never applies and would be refused if it did."""


@dataclass(frozen=True, slots=True)
class SchemaWarning:
    """Something in a schema that may not do what its author means.

    pointer: JSON pointer (RFC 6901) to the keyword in the schema as sent. message: what is the matter
    and what to write, where that is known.
    """

    pointer: str
    kind: WarningKind
    message: str


@dataclass(frozen=True, slots=True)
class Rewrite:
    """An equivalent form that was taken in place of what is written at a pointer."""

    pointer: str
    what: str


@dataclass(frozen=True)
class GrammarReport:
    """What was found out about a grammar of a caller.

    enforcement: ENFORCED, or CHECKED where at least one keyword is. keywords: all of a JSON schema;
    empty for other kinds. ebnf_bytes: size of the grammar that engines compile, as UTF-8.
    seconds: time of the analysis. why: for CHECKED of another kind, what the grammar cannot do and
    what would help; else empty, as the keywords say it. warnings: of a JSON schema.
    """

    enforcement: Enforcement
    keywords: tuple[KeywordReport, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    ebnf_bytes: int = 0
    seconds: float = 0.0
    why: str = ""
    warnings: tuple[SchemaWarning, ...] = ()

    def __hash__(self) -> int:
        # Reports are keys of caches, and may have thousands of keywords.
        return hash((len(self.keywords), self.ebnf_bytes, self.seconds, self.why))

    @property
    def misspelt(self) -> tuple[SchemaWarning, ...]:
        """What looks like a keyword and is none."""
        return tuple(w for w in self.warnings if w.kind is WarningKind.MISSPELT_KEYWORD)

    @cached_property
    def checked(self) -> tuple[KeywordReport, ...]:
        """The keywords that only the final validation keeps."""
        return tuple(k for k in self.keywords if k.enforcement is Enforcement.CHECKED)

    def checked_only(self, why: str) -> GrammarReport:
        """The same where no grammar is enforced, for this reason. Every call with a schema asks for
        it, so that it is kept."""
        found = self._checked_only.get(why)
        if found is None:
            found = self._checked_only[why] = self._without_enforcement(why)
        return found

    @cached_property
    def _checked_only(self) -> dict[str, GrammarReport]:
        return {}

    def _without_enforcement(self, why: str) -> GrammarReport:
        keywords = tuple(
            one
            if one.enforcement is Enforcement.ANNOTATION
            else replace(one, enforcement=Enforcement.CHECKED, why=why)
            for one in self.keywords
        )
        checked = replace(self, enforcement=Enforcement.CHECKED, keywords=keywords)
        return replace(checked, why="" if checked.checked else why)


NOT_ENFORCED = "this engine does not enforce grammars"


def under(capabilities: Capabilities, report: GrammarReport) -> GrammarReport:
    """The report on an engine: where it does not enforce grammars, everything is only checked."""
    if capabilities.enforcer is Enforcer.MASK:
        return report
    return report.checked_only(capabilities.not_enforced or NOT_ENFORCED)


@dataclass(frozen=True, slots=True)
class Analysed:
    """A grammar ready for engines (its ``ebnf`` is set), and what is known about it."""

    grammar: Grammar
    report: GrammarReport
