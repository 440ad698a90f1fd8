"""What is known of each kind of server: how it is asked, and what it does not take.

One record per kind. Facts about a single server, such as its context, are in `BackEnd`; what was read or
probed there comes before what a record says.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from service.types import Grammar, GrammarKind

Fields = Mapping[str, Any]
"""Fields of a request body."""
Form = Callable[[Grammar], Fields]
"""How a grammar is sent. A JSON schema stands as ``Verbatim``, so that its numbers stay as they were
written."""

MAX_TOKENS, MAX_COMPLETION_TOKENS = "max_tokens", "max_completion_tokens"
_METACHARACTERS = frozenset(r"\.^$*+?{}[]|()/-")


class Protocol(enum.Enum):
    """The API through which a server is asked."""

    OPENAI = "openai"
    """POST /v1/chat/completions."""
    OLLAMA = "ollama"
    """POST /api/chat: Ollama's own API, because its OpenAI API cuts prompts without a word."""
    QWEN3VL = "qwen3vl"
    """The gRPC API of this project."""


@dataclass(frozen=True, slots=True)
class Verbatim:
    """JSON text that becomes part of a body unchanged."""

    text: str


@dataclass(frozen=True, slots=True)
class ServerKind:
    """A kind of server.

    Attributes:
        name: value of the setting ``remote_kind``.
        health: path that tells whether the server works; None: ``/v1/models`` does.
        grammars: kinds of grammar that the server takes -> how each is sent.
        names: field of ``Sampling`` -> the name of the option in a body, without ``max_tokens``.
        takes: those fields that this kind of server is known to honour.
        seeds: seeds below this number are accepted; larger ones are reduced to this range.
        token_limit: name of the field for the maximum number of tokens of an answer.
        fixed: fields of every body.
        no_thinking: fields that turn the thoughts of a model off.
        describes_itself: the server tells all that it can do; nothing is concluded from this record.
        own: a server of this project, whose errors have reasons that callers know.
        closes_streams: closes the connection after a stream, and does not say so. A request on such a
            connection would be lost.
        wholes: an answer that nobody reads piece by piece is asked for as a whole: a stream costs the
            server more, and it notices callers that leave without one, too.
        limits_itself: without a maximum number of tokens the server takes the same as this service.
        schema_errors: statuses of a request that the server refused before it generated anything,
            perhaps for its schema.
        keywords: keywords of JSON Schema that the server reads without an error; None: every keyword.
        refused: what this kind of server cannot do -> the reason, for people.
    """

    name: str
    protocol: Protocol = Protocol.OPENAI
    health: str | None = "/health"
    grammars: Mapping[GrammarKind, Form] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    takes: frozenset[str] = frozenset()
    seeds: int = 2**63
    token_limit: str = MAX_COMPLETION_TOKENS
    fixed: Fields = field(default_factory=dict)
    no_thinking: Fields = field(default_factory=dict)
    describes_itself: bool = False
    own: bool = False
    closes_streams: bool = False
    wholes: bool = False
    limits_itself: bool = False
    schema_errors: frozenset[int] = frozenset({400, 422})
    keywords: frozenset[str] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)


def _response_format(grammar: Grammar) -> Fields:
    schema = {"name": "answer", "strict": True, "schema": Verbatim(grammar.source)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


_LAYOUT = '"x-guidance":{"whitespace_flexible":false,"item_separator":", ","key_separator":": "}'
"""Of llguidance, in the schema. Without it an answer may have any number of blanks and line breaks, and
small models write them until the limit of tokens."""


def _guidance_format(grammar: Grammar) -> Fields:
    """A schema for llguidance, with one layout of JSON, unless the caller's schema sets its own."""
    source = grammar.source.strip()
    if not source.startswith("{") or '"x-guidance"' in source:
        return _response_format(grammar)
    rest = source[1:].lstrip()
    comma = "" if rest.startswith("}") else ","
    return _response_format(replace(grammar, source=f"{{{_LAYOUT}{comma}{rest}"))


def _own_format(grammar: Grammar) -> Fields:
    """This server has put the schema into the prompt, or was told not to."""
    return {**_response_format(grammar), "schema_in_prompt": False}


def _ollama_format(grammar: Grammar) -> Fields:
    return {"format": Verbatim(grammar.source)}


def _structured(name: str) -> Form:
    """In the spelling of vLLM since 0.12."""

    def form(grammar: Grammar) -> Fields:
        value = choices_of(grammar) if grammar.kind is GrammarKind.CHOICE else grammar.source
        return {"structured_outputs": {name: value}}

    return form


def _field_of_regex(name: str) -> Form:
    return lambda grammar: {name: regex_of(grammar)}


def _regex_schema(grammar: Grammar) -> Fields:
    return {"response_format": {"type": "regex_schema", "regex_schema": regex_of(grammar)}}


def _typed_regex(grammar: Grammar) -> Fields:
    return {"grammar": {"type": "regex", "value": regex_of(grammar)}}


def _gbnf_of_choices(grammar: Grammar) -> Fields:
    literals = (json.dumps(one, ensure_ascii=False) for one in choices_of(grammar))
    return {"grammar": f"root ::= {' | '.join(literals)}"}


def choices_of(grammar: Grammar) -> list[str]:
    """The options of a choice."""
    found: list[str] = json.loads(grammar.source)
    return found


def regex_of(grammar: Grammar) -> str:
    """A regular expression, also for a choice."""
    if grammar.kind is GrammarKind.CHOICE:
        return f"({'|'.join(map(_literal, choices_of(grammar)))})"
    return grammar.source


def _literal(text: str) -> str:
    return "".join(f"\\{one}" if one in _METACHARACTERS else one for one in text)


_OPENAI_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
}
_LLAMA_NAMES = {**_OPENAI_NAMES, "repetition_penalty": "repeat_penalty"}
_ALL = frozenset(_OPENAI_NAMES)
_JSON = {GrammarKind.JSON_SCHEMA: _response_format}
_VLLM_GRAMMARS = {
    **_JSON,
    GrammarKind.REGEX: _structured("regex"),
    GrammarKind.CHOICE: _structured("choice"),
    GrammarKind.EBNF: _structured("grammar"),
}
_TEMPLATE_WITHOUT_THOUGHTS = {"chat_template_kwargs": {"enable_thinking": False}}
_NO_PLAIN_GRAMMARS = "takes JSON schemas only"

_RECORDS = (
    ServerKind(
        "vllm",
        grammars=_VLLM_GRAMMARS,
        names=_OPENAI_NAMES,
        takes=_ALL,
        no_thinking=_TEMPLATE_WITHOUT_THOUGHTS,
        refused={"guided_*": "gone since vLLM 0.12, which ignores it; structured_outputs is sent"},
    ),
    ServerKind(
        "sglang",
        grammars={
            **_JSON,
            GrammarKind.REGEX: _field_of_regex("regex"),
            GrammarKind.CHOICE: _field_of_regex("regex"),
            GrammarKind.EBNF: lambda grammar: {"ebnf": grammar.source},
        },
        names=_OPENAI_NAMES,
        takes=_ALL,
        no_thinking=_TEMPLATE_WITHOUT_THOUGHTS,
    ),
    ServerKind(
        "lmdeploy",
        grammars={
            **_JSON,
            GrammarKind.REGEX: _regex_schema,
            GrammarKind.CHOICE: _regex_schema,
        },
        names=_OPENAI_NAMES,
        takes=_ALL,
        no_thinking=_TEMPLATE_WITHOUT_THOUGHTS,
        refused={"ebnf": "LMDeploy's API has no field for it"},
    ),
    ServerKind(
        "llama.cpp",
        grammars={
            **_JSON,
            GrammarKind.CHOICE: _gbnf_of_choices,
            GrammarKind.EBNF: lambda grammar: {"grammar": grammar.source},
        },
        names=_LLAMA_NAMES,
        takes=_ALL,
        seeds=2**32 - 1,  # the largest number asks for a random seed
        token_limit=MAX_TOKENS,
        no_thinking=_TEMPLATE_WITHOUT_THOUGHTS,
        closes_streams=True,
        wholes=True,
        refused={"regex": "llama.cpp takes regular expressions only inside a JSON schema"},
    ),
    ServerKind(
        "ollama",
        protocol=Protocol.OLLAMA,
        health="/api/version",
        grammars={GrammarKind.JSON_SCHEMA: _ollama_format},
        names=_LLAMA_NAMES,
        takes=_ALL,
        seeds=2**31,
        token_limit="num_predict",
        schema_errors=frozenset({400, 422, 500}),
        fixed={"truncate": False},  # a prompt that is too long is an error, not cut
        no_thinking={"think": False},
        refused=dict.fromkeys(("regex", "choice", "ebnf"), _NO_PLAIN_GRAMMARS),
    ),
    ServerKind(
        "lm-studio",
        health=None,
        grammars=_JSON,
        names=_LLAMA_NAMES,
        takes=_ALL,
        seeds=2**31,
        token_limit=MAX_TOKENS,
        refused=dict.fromkeys(("regex", "choice", "ebnf"), _NO_PLAIN_GRAMMARS),
    ),
    ServerKind(
        "vllm-mlx",
        grammars=_JSON,
        names={name: name for name in ("temperature", "top_p", "top_k", "repetition_penalty")},
        takes=frozenset({"temperature", "top_p"}),
        token_limit=MAX_TOKENS,
        refused={
            "seed": "vLLM-MLX has no such field",
            **dict.fromkeys(("regex", "choice", "ebnf"), _NO_PLAIN_GRAMMARS),
        },
    ),
    ServerKind(
        "mistral.rs",
        grammars={
            GrammarKind.JSON_SCHEMA: _guidance_format,
            GrammarKind.REGEX: _typed_regex,
            GrammarKind.CHOICE: _typed_regex,
        },
        names={name: name for name in ("temperature", "top_p", "top_k", "repetition_penalty")},
        takes=frozenset({"temperature", "top_p", "top_k", "repetition_penalty"}),
        token_limit=MAX_TOKENS,
        schema_errors=frozenset({400, 422, 500}),
        no_thinking={"enable_thinking": False},
        refused={
            "seed": "mistral.rs has no such field",
            "ebnf": "mistral.rs takes Lark grammars, which are written differently",
        },
    ),
    ServerKind(
        "qwen3vl-http",
        health="/healthz",
        grammars={**_VLLM_GRAMMARS, GrammarKind.JSON_SCHEMA: _own_format},
        names=_OPENAI_NAMES,
        takes=_ALL,
        seeds=2**64,
        own=True,
        limits_itself=True,
    ),
    ServerKind(
        "qwen3vl-grpc",
        protocol=Protocol.QWEN3VL,
        health=None,
        seeds=2**64,
        describes_itself=True,
        own=True,
        limits_itself=True,
    ),
    ServerKind(
        "unknown",
        health=None,
        grammars=_JSON,
        names=_OPENAI_NAMES,
        takes=frozenset({"temperature", "top_p", "seed"}),
        seeds=2**31,
        token_limit=MAX_TOKENS,
        refused={
            "top_k": "not of OpenAI's API; name the kind of the server (remote_kind)",
            "repetition_penalty": "not of OpenAI's API; name the kind of the server (remote_kind)",
            **dict.fromkeys(("regex", "choice", "ebnf"), _NO_PLAIN_GRAMMARS),
        },
    ),
)

SERVERS: dict[str, ServerKind] = {record.name: record for record in _RECORDS}
"""Every kind of server by its name; ``unknown`` speaks OpenAI's API and nothing more."""
