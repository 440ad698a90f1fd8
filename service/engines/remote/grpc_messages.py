"""Plain values -> messages of this project's own gRPC API, and its descriptions -> plain values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields

from service import __version__
from service.engines.remote.backend import BackEnd, Finding, State
from service.engines.remote.images import WholeFile
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.types import (
    GenerateRequest,
    Grammar,
    GrammarKind,
    ImagePart,
    Message,
    PropertyOrder,
    Role,
    Sampling,
    TextPart,
    Usage,
)

KIND = "qwen3vl-grpc"
ROLES = {
    Role.SYSTEM: pb.ROLE_SYSTEM,
    Role.USER: pb.ROLE_USER,
    Role.ASSISTANT: pb.ROLE_ASSISTANT,
    Role.TOOL: pb.ROLE_TOOL,
}
PROPERTY_ORDERS = {
    None: pb.PROPERTY_ORDER_UNSPECIFIED,
    PropertyOrder.DECLARED: pb.PROPERTY_ORDER_DECLARED,
    PropertyOrder.ANY: pb.PROPERTY_ORDER_ANY,
}
_OPTIONS = tuple(one.name for one in fields(Sampling))
_ASSUMED = Finding(State.YES, "what every server of this project can do")


def encode_request(
    request: GenerateRequest, images: Sequence[WholeFile], model: str
) -> pb.StreamTaskRequest:
    """The request as an inline task. images: in the order of the prompt."""
    grammar = None if request.grammar is None else encode_grammar(request.grammar)
    shown = [_image(one) for one in images]
    inline = pb.InlineTask(
        grammar=grammar,
        tools=[
            pb.ToolDefinition(
                name=one.name, description=one.description, parameters_json=one.parameters
            )
            for one in request.tools
        ],
    )
    if request.messages:
        remaining = iter(shown)
        inline.messages.extend(_message(one, remaining) for one in request.messages)
        shown = []
    else:
        inline.system, inline.user = request.system, request.user
    if request.grammar is not None and request.grammar.kind is GrammarKind.JSON_SCHEMA:
        inline.schema_in_prompt = False  # this server has put it there, or was told not to
    return pb.StreamTaskRequest(
        task=pb.Task(inline=inline),
        images=shown,
        sampling=encode_sampling(request.sampling),
        model=model,
    )


def encode_grammar(grammar: Grammar) -> pb.Grammar:
    """The grammar as its caller wrote it; the other server analyses it itself."""
    if grammar.kind is GrammarKind.CHOICE:
        return pb.Grammar(choice=pb.Choice(options=json.loads(grammar.source)))
    found = pb.Grammar()
    setattr(found, grammar.kind.value, grammar.source)
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        found.property_order = PROPERTY_ORDERS[grammar.property_order]
    return found


def encode_sampling(sampling: Sampling) -> pb.SamplingOptions:
    """Only options that differ from their defaults: a server refuses values that turn one off."""
    defaults = Sampling()
    given = {name: getattr(sampling, name) for name in _OPTIONS}
    return pb.SamplingOptions(
        **{name: value for name, value in given.items() if value != getattr(defaults, name)}
    )


def decode_usage(usage: pb.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.image_tokens, usage.output_tokens)


def assumed(url: str, model: str) -> BackEnd:
    """A server that has not been reached yet. It may turn out to do less; a request that needs more
    is then not sent to it."""
    return BackEnd(
        url,
        KIND,
        model,
        grammars=dict.fromkeys(GrammarKind, _ASSUMED),
        sampling=dict.fromkeys(_OPTIONS, _ASSUMED),
        not_enforced="",
    )


def described(url: str, told: pb.GetModelResponse) -> BackEnd:
    """A model of a server, by what the server says of it."""
    known = told.capabilities
    evidence = "GetModel"
    kinds = {
        kind: _finding(f"GRAMMAR_KIND_{kind.name}" in _names(known.grammar_kinds), evidence)
        for kind in GrammarKind
    }
    return BackEnd(
        url=url,
        kind=KIND,
        model=told.name,
        version=told.server_version,
        answers_as=told.name,
        context_length=known.context_length or None,
        vision=_finding(pb.MODALITY_IMAGE in known.modalities, evidence),
        grammars=kinds,
        sampling={name: _finding(name in known.sampling_options, evidence) for name in _OPTIONS},
        not_enforced=not_enforced(told),
        schema_in_prompt=known.schema_in_prompt,
        max_images=min(known.max_images, told.limits.max_images),
        details={"engine": told.engine, **told.details},
    )


def not_enforced(told: pb.GetModelResponse) -> str:
    """Why the server does not enforce what the analysis of this server says; empty where it does."""
    if told.capabilities.enforcer != pb.ENFORCER_MASK:
        return (
            "the model runs on another server, whose engine does not enforce grammars: the answer is "
            "checked against the schema, but not forced to fit"
        )
    if told.server_version != __version__:
        return (
            f"the model runs on a server of another version ({told.server_version or 'unknown'}) than "
            f"this one ({__version__}), which may enforce other keywords: the answer is checked "
            "against the schema"
        )
    return ""


def _names(kinds: Sequence[pb.GrammarKind.ValueType]) -> set[str]:
    known = pb.GrammarKind.keys()
    values = {pb.GrammarKind.Value(name): name for name in known}
    return {values[one] for one in kinds if one in values}


def _finding(told: bool, evidence: str) -> Finding:
    return Finding(State.YES if told else State.NO, evidence)


def _image(file: WholeFile) -> pb.Image:
    return pb.Image(data=file.data, min_pixels=file.min_pixels, max_pixels=file.max_pixels)


def _message(message: Message, images: Iterator[pb.Image]) -> pb.Message:
    return pb.Message(
        role=ROLES[message.role],
        parts=[_part(part, images) for part in message.parts],
        tool_calls=[
            pb.ToolCall(name=one.name, arguments_json=one.arguments) for one in message.tool_calls
        ],
    )


def _part(part: TextPart | ImagePart, images: Iterator[pb.Image]) -> pb.Part:
    if isinstance(part, TextPart):
        return pb.Part(text=part.text)
    return pb.Part(image=next(images))
