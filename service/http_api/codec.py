"""OpenAI's chat completions <-> plain values. Pure functions; every rule about fields is here.

A rule that is broken raises ``InvalidRequest`` with the path of the field, as the caller wrote it
(``messages[0].content[1].image_url.url``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from service.errors import InvalidRequest, TooManyImages
from service.http_api.images import decode_image
from service.http_api.models import (
    AssistantMessage,
    ChatRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    StructuredOutputs,
    SystemMessage,
    Tool,
    ToolMessage,
    UserMessage,
)
from service.http_api.models import (
    ImagePart as ImagePartModel,
)
from service.http_api.models import (
    TextPart as TextPartModel,
)
from service.http_api.payloads import Payloads
from service.http_api.reading import read_json, read_model
from service.inference.calls import Call, InlineTask
from service.inference.sampling import refuse, violations
from service.quotas import ANONYMOUS, Caller
from service.schema_compiler import jsontext
from service.schema_compiler.exact import text_of
from service.settings import Settings
from service.types import (
    EncodedImage,
    Grammar,
    GrammarKind,
    ImagePart,
    Message,
    Role,
    Sampling,
    TextPart,
    ToolCall,
)

ANY_OBJECT = '{"type": "object"}'
TASK_NAME_LIMIT = 128
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
FIELDS = {
    "sampling": "",
    "images": "messages",
    "task": "messages",
    "task.name": "task",
    "task.inline": "",
}
"""Paths of errors of the inference layer -> the fields of a request that they are about."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A decoded request.

    tool: name of the tool that the answer calls; None where the answer is a text. fields: paths in
    errors of the inference layer -> paths in this request, see ``path_of``.
    """

    model: str
    call: Call
    stream: bool = False
    include_usage: bool = False
    tool: str | None = None
    fields: Mapping[str, str] = field(default_factory=lambda: dict(FIELDS))


def decode_chat(body: bytes, limits: Settings, caller: Caller = ANONYMOUS) -> Asked:
    """The body of POST /v1/chat/completions -> Asked.

    Takes milliseconds for megabytes, so large bodies are decoded outside of the event loop.
    """
    payloads = Payloads(body)
    asked = _decode(payloads, limits, caller)
    if not payloads.all_used:  # what looks like an image stands somewhere else, such as in a text
        asked = _decode(Payloads(body, keep=True), limits, caller)
    return asked


def _decode(payloads: Payloads, limits: Settings, caller: Caller) -> Asked:
    request = read_model(ChatRequest, read_json(payloads.lean))
    fields = dict(FIELDS)
    forced = _forced_tool(request)
    grammar = _grammar(request, forced, fields)
    task: str | InlineTask
    if request.task is not None:
        task, images = _registered(request, grammar, limits.max_images, payloads)
    else:
        messages, images = _conversation(request, limits.max_images, payloads)
        task = InlineTask("", "", grammar, messages)
    stream = bool(request.stream)
    call = Call(
        task,
        images,
        _sampling(request, fields),
        accept_empty=bool(request.accept_empty),
        strict=bool(request.require_enforced),
        caller=caller,
        accept_cut=True,
        stop=_stops(request.stop),
    )
    return Asked(
        request.model,
        call,
        stream,
        _include_usage(request, stream),
        None if forced is None else forced.function.name,
        fields,
    )


def path_of(name: str, fields: Mapping[str, str]) -> str:
    """The path in the request of a path in an error; the longest one of ``fields`` decides."""
    for end in range(len(name), 0, -1):
        known = fields.get(name[:end])
        if known is not None and (end == len(name) or name[end] in ".["):
            return f"{known}{name[end:]}".lstrip(".")
    return name


# Messages


def _conversation(
    request: ChatRequest, max_images: int, payloads: Payloads
) -> tuple[tuple[Message, ...], tuple[EncodedImage, ...]]:
    images: list[EncodedImage] = []
    found: list[Message] = []
    calls: set[str] = set()
    for index, message in enumerate(request.messages):
        path = f"messages[{index}]"
        if isinstance(message, SystemMessage):
            if index:
                raise InvalidRequest(
                    f"{path}.role", f"only the first message may be one of the role {message.role}"
                )
            found.append(Message(Role.SYSTEM, _texts(message.content)))
        elif isinstance(message, UserMessage):
            found.append(Message(Role.USER, _parts(message.content, path, images, payloads)))
        elif isinstance(message, AssistantMessage):
            found.append(_assistant(message, path))
            calls |= {call.id for call in message.tool_calls or ()}
        else:
            _check_tool_result(message, path, calls)
            found.append(Message(Role.TOOL, _parts(message.content, path, images, payloads)))
    if len(images) > max_images:
        raise TooManyImages(len(images), max_images, "messages")
    if found[-1].role not in (Role.USER, Role.TOOL):
        raise InvalidRequest(
            f"messages[{len(found) - 1}].role",
            "the last message must be one of the user or of a tool: the answer follows it",
        )
    return tuple(found), tuple(images)


def _texts(content: str | Sequence[TextPartModel] | None) -> tuple[TextPart, ...]:
    if content is None:
        return ()
    return (
        (TextPart(content),)
        if isinstance(content, str)
        else tuple(TextPart(part.text) for part in content)
    )


def _parts(
    content: str | Sequence[TextPartModel | ImagePartModel],
    path: str,
    images: list[EncodedImage],
    payloads: Payloads,
) -> tuple[TextPart | ImagePart, ...]:
    if isinstance(content, str):
        return (TextPart(content),)
    found: list[TextPart | ImagePart] = []
    for index, part in enumerate(content):
        if isinstance(part, TextPartModel):
            found.append(TextPart(part.text))
        else:
            images.append(decode_image(part, f"{path}.content[{index}]", payloads))
            found.append(ImagePart())
    return tuple(found)


def _assistant(message: AssistantMessage, path: str) -> Message:
    calls = message.tool_calls or ()
    if message.content is None and not calls:
        raise InvalidRequest(f"{path}.content", "is required where no tool is called")
    for index, call in enumerate(calls):
        _check_arguments(call.function.arguments, f"{path}.tool_calls[{index}].function.arguments")
    return Message(
        Role.ASSISTANT,
        _texts(message.content),
        tuple(ToolCall(call.function.name, call.function.arguments) for call in calls),
    )


def _check_arguments(text: str, path: str) -> None:
    try:
        value = jsontext.decode(text)
    except jsontext.JsonTextError as error:
        raise InvalidRequest(path, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(path, "must be a JSON object, as text")


def _check_tool_result(message: ToolMessage, path: str, calls: set[str]) -> None:
    if message.tool_call_id not in calls:
        raise InvalidRequest(
            f"{path}.tool_call_id", "is not the id of a tool call of an earlier message"
        )


def _registered(
    request: ChatRequest, grammar: Grammar | None, max_images: int, payloads: Payloads
) -> tuple[str, tuple[EncodedImage, ...]]:
    """The name of a registered task, and the images of the one message that stands beside it."""
    name = request.task
    assert name is not None
    if not name or len(name) > TASK_NAME_LIMIT:
        raise InvalidRequest("task", f"must be a name of 1 to {TASK_NAME_LIMIT} characters")
    for other in ("response_format", "structured_outputs", "tools", "tool_choice"):
        given = getattr(request, other)
        if given is not None and not (other == "response_format" and grammar is None):
            raise InvalidRequest(other, "must be left out beside task; the task brings its grammar")
    message = request.messages[0]
    if len(request.messages) > 1 or not isinstance(message, UserMessage):
        raise InvalidRequest(
            "messages", "beside task there is one message, of the user, with the images alone"
        )
    images: list[EncodedImage] = []
    for index, part in enumerate(_parts(message.content, "messages[0]", images, payloads)):
        if isinstance(part, TextPart) and part.text.strip():
            place = "" if isinstance(message.content, str) else f"[{index}]"
            raise InvalidRequest(
                f"messages[0].content{place}",
                "must have no text beside task; the task brings its prompt",
            )
    if len(images) > max_images:
        raise TooManyImages(len(images), max_images, "messages")
    return name, tuple(images)


# The form of the answer


def _grammar(request: ChatRequest, forced: Tool | None, fields: dict[str, str]) -> Grammar | None:
    """The constraint on the answer; ``fields`` learns where its source stands in the request."""
    found: list[tuple[str, Grammar, str]] = []
    chosen = request.response_format
    if isinstance(chosen, JsonObjectFormat):
        found.append(
            ("response_format", Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT), "response_format")
        )
    elif isinstance(chosen, JsonSchemaFormat):
        source = Grammar(GrammarKind.JSON_SCHEMA, text_of(chosen.json_schema.schema_))
        found.append(("response_format", source, "response_format.json_schema.schema"))
    if request.structured_outputs is not None:
        found.append(("structured_outputs", *_structured(request.structured_outputs)))
    if forced is not None:
        index = (request.tools or []).index(forced)
        source = Grammar(GrammarKind.JSON_SCHEMA, text_of(_parameters(forced, index)))
        found.append(("tool_choice", source, f"tools[{index}].function.parameters"))
    if not found:
        return None
    if len(found) > 1:
        raise InvalidRequest(
            found[1][0], f"constrains the answer beside {found[0][0]}; send one of them"
        )
    _, grammar, path = found[0]
    fields[f"task.inline.grammar.{grammar.kind.value}"] = path
    fields[f"task.inline.grammar.{grammar.kind.value}.options"] = path
    return grammar


def _structured(given: StructuredOutputs) -> tuple[Grammar, str]:
    kinds = {
        "json": (GrammarKind.JSON_SCHEMA, given.json_),
        "regex": (GrammarKind.REGEX, given.regex),
        "choice": (GrammarKind.CHOICE, given.choice),
        "grammar": (GrammarKind.EBNF, given.grammar),
    }
    chosen = {name: one for name, one in kinds.items() if one[1] is not None}
    if len(chosen) != 1:
        raise InvalidRequest("structured_outputs", f"must have exactly one of {', '.join(kinds)}")
    name, (kind, value) = chosen.popitem()
    source = value if isinstance(value, str) else text_of(value)
    return Grammar(kind, source), f"structured_outputs.{name}"


def _forced_tool(request: ChatRequest) -> Tool | None:
    """The tool that the answer has to call; None where the answer is a text."""
    tools, choice = request.tools or [], request.tool_choice
    names = [tool.function.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(f"tools[{index}].function.name", f"{name} is defined twice")
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise InvalidRequest("tool_choice.function.name", "is not the name of one of the tools")
        return tools[names.index(choice.function.name)]
    if choice == "required":
        if not tools:
            raise InvalidRequest(
                "tool_choice",
                "required needs tools; for an answer in JSON use response_format with the type "
                "json_schema",
            )
        if len(tools) > 1:
            raise InvalidRequest(
                "tool_choice",
                f"required is supported with one tool, not with {len(tools)}; name the tool: "
                '{"type": "function", "function": {"name": …}}',
            )
        return tools[0]
    if tools and choice != "none":
        raise InvalidRequest(
            "tool_choice",
            "auto is not supported with tools: the model cannot choose; name a tool, use required "
            "with one tool, or none",
        )
    return None


def _parameters(tool: Tool, index: int) -> dict[str, Any]:
    """The schema of the arguments, which are an object."""
    schema = tool.function.parameters
    if schema is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if "type" not in schema and "$ref" not in schema:
        return {"type": "object", **schema}
    if schema.get("type", "object") != "object":
        raise InvalidRequest(
            f"tools[{index}].function.parameters",
            "must be the JSON Schema of an object: arguments are an object",
        )
    return schema


# Options


def _sampling(request: ChatRequest, fields: dict[str, str]) -> Sampling:
    given = {name: value for name in SAMPLING if (value := getattr(request, name)) is not None}
    if given.get("top_k") in (0, -1):
        del given["top_k"]
    newer, older = request.max_completion_tokens, request.max_tokens
    if newer is not None and older is not None and newer != older:
        raise InvalidRequest(
            "max_tokens", f"is {older}, but max_completion_tokens is {newer}; send one of them"
        )
    most = older if newer is None else newer
    if most is not None:
        given["max_tokens"] = most
        fields["sampling.max_tokens"] = "max_tokens" if newer is None else "max_completion_tokens"
    refuse([replace(one, field=path_of(one.field, fields)) for one in violations(given)])
    return Sampling(**given)


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _include_usage(request: ChatRequest, stream: bool) -> bool:
    options = request.stream_options
    if options is None:
        return False
    if not stream:
        raise InvalidRequest("stream_options", "is for streams alone; set stream to true")
    if options.include_obfuscation:
        raise InvalidRequest(
            "stream_options.include_obfuscation", "must be false; chunks are sent as they are"
        )
    return bool(options.include_usage)
