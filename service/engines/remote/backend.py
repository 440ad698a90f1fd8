"""What is known of one model on one server, as plain values."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from service.engines.remote.servers import SERVERS, ServerKind
from service.types import GrammarKind

T = TypeVar("T")


class State(enum.Enum):
    """Whether a server has an ability. UNKNOWN: nothing was read, and no probe gave a result."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """An ability, and how it was found out, for people."""

    state: State = State.UNKNOWN
    evidence: str = ""


NOTHING_KNOWN = Finding()
NOT_ENFORCED = (
    "the model runs on another server, which may drop a schema without a word: the answer is "
    "checked against the schema, but not forced to fit"
)


@dataclass(frozen=True, slots=True)
class BackEnd:
    """One model on one server.

    Attributes:
        url: base URL, without ``/v1``.
        kind: name in `SERVERS`.
        model: name of the model for requests.
        version: of the server; empty where it does not tell.
        answers_as: the name of the model that answers have; empty where that is not known.
        context_length: tokens of prompt and answer together, as loaded; None where it is not known.
        vision: whether the model sees images.
        grammars: kind of grammar -> whether the server constrains answers by it.
        sampling: field of ``Sampling`` -> whether the server honours it.
        token_limit: name of the field for the maximum number of tokens; None: that of the kind.
        thinking: whether the model writes thoughts unless they are turned off.
        not_enforced: why its answers are not held to their grammars while they are generated, as
            the analysis of this server says; empty where they are.
        max_images: maximum number of images in a request; None where it is not known.
        schema_in_prompt: whether the server shows the schema of the answer to the model where a caller
            does not say, for servers of this project.
        details: what else the server tells, for operators.
    """

    url: str
    kind: str
    model: str
    version: str = ""
    answers_as: str = ""
    context_length: int | None = None
    vision: Finding = NOTHING_KNOWN
    grammars: Mapping[GrammarKind, Finding] = field(default_factory=dict)
    sampling: Mapping[str, Finding] = field(default_factory=dict)
    token_limit: str | None = None
    thinking: Finding = NOTHING_KNOWN
    not_enforced: str = NOT_ENFORCED
    max_images: int | None = None
    schema_in_prompt: bool = False
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def server(self) -> ServerKind:
        """The record of the kind of server."""
        return SERVERS[self.kind]

    @property
    def grammar_kinds(self) -> frozenset[GrammarKind]:
        """Kinds of grammar that are sent: those of the record, without those that were found to
        have no effect."""
        if self.server.describes_itself:
            return frozenset(_told(self.grammars))
        return frozenset(
            kind
            for kind in self.server.grammars
            if self.grammars.get(kind, NOTHING_KNOWN).state is not State.NO
        )

    @property
    def sampling_options(self) -> frozenset[str]:
        """Fields of ``Sampling`` that are sent."""
        found = {"max_tokens"}
        if self.server.describes_itself:
            return frozenset(found | _told(self.sampling))
        for name in self.server.names:
            state = self.sampling.get(name, NOTHING_KNOWN).state
            if state is State.YES or (state is State.UNKNOWN and name in self.server.takes):
                found.add(name)
        return frozenset(found)


def _told(findings: Mapping[T, Finding]) -> set[T]:
    """The abilities that a server says it has."""
    return {name for name, one in findings.items() if one.state is State.YES}
