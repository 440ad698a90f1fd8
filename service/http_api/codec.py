"""What the requests of OpenAI's APIs share: conversations, the form of the answer, sampling.

Pure functions on plain values. A rule that is broken raises ``InvalidRequest`` with the path of the
field, as the caller wrote it (``messages[0].content[1].image_url.url``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from service.errors import InvalidRequest, TooManyImages
from service.http_api.fields import ImageSource
from service.http_api.images import RemoteImage, decode_image
from service.http_api.payloads import Payloads
from service.inference.calls import Call
from service.inference.sampling import refuse, violations
from service.schema_compiler import jsontext
from service.schema_compiler.exact import text_of
from service.settings import Settings
from service.types import (
    EncodedImage,
    Grammar,
    GrammarKind,
    ImagePart,
    Message,
    PropertyOrder,
    Role,
    Sampling,
    TextPart,
    ToolCall,
)

ANY_OBJECT = '{"type": "object"}'
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")


@dataclass(frozen=True, slots=True)
class Asked:
    """A decoded request.

    tool: name of the tool that the answer calls; None where the answer is a text. fields: paths in
    errors of the inference layer -> paths in this request, see ``path_of``. echo: JSON object with
    fields of the request that the answer repeats. remote: images of the call that have no bytes yet.
    """

    model: str
    call: Call
    stream: bool = False
    include_usage: bool = False
    tool: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    echo: bytes = b"{}"
    remote: tuple[RemoteImage, ...] = ()


def decoded(payloads: Payloads, decode: Callable[[Payloads], Asked]) -> Asked:
    """Decode a body whose images have been taken out, so that what is read as JSON is small."""
    asked = decode(payloads)
    if not payloads.all_used:  # what looks like an image stands somewhere else, such as in a text
        asked = decode(Payloads(payloads.body, keep=True))
    return asked


def path_of(name: str, fields: Mapping[str, str]) -> str:
    """The path in the request of a path in an error; the longest one of ``fields`` decides."""
    for end in range(len(name), 0, -1):
        known = fields.get(name[:end])
        if known is not None and (end == len(name) or name[end] in ".["):
            return f"{known}{name[end:]}".lstrip(".")
    return name


# The conversation


class Conversation:
    """Collects the messages of a request in order, and the images of their parts.

    root: path of the list of messages in the request.
    """

    def __init__(self, root: str, limits: Settings, payloads: Payloads) -> None:
        self._root = root
        self._max_images = limits.max_images
        self._fetched = bool(limits.image_hosts)
        self._payloads = payloads
        self._messages: list[Message] = []
        self._images: list[EncodedImage] = []
        self._remote: list[RemoteImage] = []
        self._calls: set[str] = set()
        self._last = root
        """Field that says whose the last message is."""

    def system(self, texts: Iterable[str], role: str, path: str) -> None:
        """Instructions, which are the first message. role: the caller's name of the role."""
        if self._messages:
            raise InvalidRequest(
                f"{path}.role", f"only the first message may be one of the role {role}"
            )
        self._add(Role.SYSTEM, _texts(texts), f"{path}.role")

    def user(self, parts: Iterable[str | ImageSource], path: str) -> None:
        """What the user says and shows. path: of the message."""
        self._add(Role.USER, self._parts(parts, path, "content"), f"{path}.role")

    def assistant(self, texts: Iterable[str], path: str) -> None:
        """An earlier answer, or the part of it that is text."""
        self._add(Role.ASSISTANT, _texts(texts), f"{path}.role")

    def tool_call(self, identity: str, name: str, arguments: str, path: str) -> None:
        """A call of a tool in an earlier answer, which it belongs to. path: of the arguments."""
        _check_arguments(arguments, path)
        self._calls.add(identity)
        if not self._messages or self._messages[-1].role is not Role.ASSISTANT:
            self._add(Role.ASSISTANT, (), f"{path.rpartition('.')[0]}.type")
        last = self._messages[-1]
        call = ToolCall(name, arguments)
        self._messages[-1] = Message(Role.ASSISTANT, last.parts, (*last.tool_calls, call))

    def tool_result(
        self,
        parts: Iterable[str | ImageSource],
        identity: str,
        path: str,
        *,
        content: str,
        key: str,
    ) -> None:
        """The result of an earlier call. content, key: names of the fields of result and call."""
        if identity not in self._calls:
            raise InvalidRequest(
                f"{path}.{key}", "is not the id of a tool call of an earlier message"
            )
        self._add(Role.TOOL, self._parts(parts, path, content), f"{path}.role")

    def whole(self) -> tuple[tuple[Message, ...], tuple[EncodedImage, ...]]:
        """Messages and images of the request."""
        images = self.images()
        if not self._messages or self._messages[-1].role not in (Role.USER, Role.TOOL):
            raise InvalidRequest(
                self._last,
                "the last message must be one of the user or of a tool: the answer follows it",
            )
        return tuple(self._messages), images

    def images(self) -> tuple[EncodedImage, ...]:
        """The images of the request."""
        if len(self._images) > self._max_images:
            raise TooManyImages(len(self._images), self._max_images, self._root)
        return tuple(self._images)

    @property
    def remote(self) -> tuple[RemoteImage, ...]:
        """Those of the images that have to be fetched."""
        return tuple(self._remote)

    def _show(self, image: EncodedImage | RemoteImage) -> None:
        if isinstance(image, RemoteImage):
            self._remote.append(image)
            image = image.image
        self._images.append(image)

    def _add(self, role: Role, parts: tuple[TextPart | ImagePart, ...], field: str) -> None:
        self._messages.append(Message(role, parts))
        self._last = field

    def _parts(
        self, parts: Iterable[str | ImageSource], path: str, content: str
    ) -> tuple[TextPart | ImagePart, ...]:
        found: list[TextPart | ImagePart] = []
        for index, part in enumerate(parts):
            if isinstance(part, str):
                found.append(TextPart(part))
            else:
                place = f"{path}.{content}[{index}]"
                self._show(decode_image(part, place, self._payloads, fetched=self._fetched))
                found.append(ImagePart())
        return tuple(found)


def _texts(texts: Iterable[str]) -> tuple[TextPart, ...]:
    return tuple(TextPart(text) for text in texts)


def _check_arguments(text: str, path: str) -> None:
    try:
        value = jsontext.decode(text)
    except jsontext.JsonTextError as error:
        raise InvalidRequest(path, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(path, "must be a JSON object, as text")


# The form of the answer


@dataclass(frozen=True, slots=True)
class Constraint:
    """A constraint on the answer: where it stands, and the path of its source.

    names_members: whether it is one that can speak of the members of objects.
    """

    name: str
    grammar: Grammar
    path: str
    names_members: bool = True


@dataclass(frozen=True, slots=True)
class Function:
    """A tool that the model may call. path: of the object with its name and parameters."""

    name: str
    parameters: Mapping[str, Any] | None
    path: str


@dataclass(frozen=True, slots=True)
class Named:
    """The choice of a function by its name. path: of the name."""

    name: str
    path: str


def any_object(name: str) -> Constraint:
    """The answer is any JSON object."""
    return Constraint(name, Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT), name, names_members=False)


def of_schema(schema: Mapping[str, Any], name: str, path: str) -> Constraint:
    """The answer is JSON that fits a schema."""
    return Constraint(name, Grammar(GrammarKind.JSON_SCHEMA, text_of(schema)), path)


def grammar_of(
    request: Any, form: Constraint | None, forced: Function | None, fields: dict[str, str]
) -> Grammar | None:
    """The grammar of the answer, of the one constraint that a request has; ``fields`` learns where its
    source stands in the request.

    request: has ``structured_outputs``, ``close_objects`` and ``property_order``. form: the constraint of
    its format. forced: the tool that the answer has to call.
    """
    found = [] if form is None else [form]
    if request.structured_outputs is not None:
        found.append(of_structured_outputs(request.structured_outputs))
    if forced is not None:
        found.append(of_tool(forced))
    if len(found) > 1:
        raise InvalidRequest(
            found[1].name, f"constrains the answer beside {found[0].name}; send one of them"
        )
    if not found:
        return _with_options(None, request)
    (only,) = found
    for option in ("close_objects", "property_order"):
        if getattr(request, option) is not None and not only.names_members:
            raise InvalidRequest(
                option,
                "is for properties that a JSON Schema names, and json_object names none; leave it out",
            )
    fields[f"task.inline.grammar.{only.grammar.kind.value}"] = only.path
    fields[f"task.inline.grammar.{only.grammar.kind.value}.options"] = only.path
    return _with_options(only.grammar, request)


def _with_options(grammar: Grammar | None, request: Any) -> Grammar | None:
    """The grammar with the caller's wishes for objects, if there are any."""
    if request.close_objects is not None:
        grammar = replace(
            _of_schemas(grammar, "close_objects"), close_objects=request.close_objects
        )
    if request.property_order is not None:
        order = PropertyOrder(request.property_order)
        grammar = replace(_of_schemas(grammar, "property_order"), property_order=order)
    return grammar


def schema_in_prompt(grammar: Grammar | None, wish: bool | None) -> bool | None:
    """The caller's wish to show the schema to the model, if there is one."""
    if wish is not None:
        _of_schemas(grammar, "schema_in_prompt")
    return wish


def _of_schemas(grammar: Grammar | None, option: str) -> Grammar:
    if grammar is None or grammar.kind is not GrammarKind.JSON_SCHEMA:
        raise InvalidRequest(option, "is for answers under a JSON Schema; leave it out")
    return grammar


def of_structured_outputs(given: Any) -> Constraint:
    """vLLM's ``structured_outputs``, of which one is given."""
    kinds: dict[str, tuple[GrammarKind, Any]] = {
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
    return Constraint("structured_outputs", Grammar(kind, source), f"structured_outputs.{name}")


def forced_tool(
    tools: Sequence[Function], choice: str | Named | None, *, schema: str, by_name: str
) -> Function | None:
    """The tool that the answer has to call; None where the answer is a text.

    schema: how to ask for an answer in JSON. by_name: how to name a tool.
    """
    names = [tool.name for tool in tools]
    for index, tool in enumerate(tools):
        if tool.name in names[:index]:
            raise InvalidRequest(f"{tool.path}.name", f"{tool.name} is defined twice")
    if isinstance(choice, Named):
        if choice.name not in names:
            raise InvalidRequest(choice.path, "is not the name of one of the tools")
        return tools[names.index(choice.name)]
    if choice == "required":
        if not tools:
            raise InvalidRequest(
                "tool_choice", f"required needs tools; for an answer in JSON use {schema}"
            )
        if len(tools) > 1:
            raise InvalidRequest(
                "tool_choice",
                f"required is supported with one tool, not with {len(tools)}; name the tool: "
                f"{by_name}",
            )
        return tools[0]
    if tools and choice != "none":
        raise InvalidRequest(
            "tool_choice",
            "auto is not supported with tools: the model cannot choose; name a tool, use required "
            "with one tool, or none",
        )
    return None


def of_tool(tool: Function) -> Constraint:
    """The answer is the arguments of a tool, which are an object."""
    path = f"{tool.path}.parameters"
    schema = tool.parameters
    if schema is None:
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
    elif "type" not in schema and "$ref" not in schema:
        schema = {"type": "object", **schema}
    elif schema.get("type", "object") != "object":
        raise InvalidRequest(path, "must be the JSON Schema of an object: arguments are an object")
    return of_schema(schema, "tool_choice", path)


# Options


def sampling(
    request: Any, max_tokens: int | None, max_tokens_field: str, fields: dict[str, str]
) -> Sampling:
    """The options of a request that has ``chat_template_kwargs`` and fields of the names of
    ``SAMPLING``.

    max_tokens_field: the name under which the request limits the tokens of its answer.
    """
    given = {name: value for name in SAMPLING if (value := getattr(request, name)) is not None}
    if given.get("top_k") in (0, -1):
        del given["top_k"]
    fields["sampling.max_tokens"] = max_tokens_field
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    template = request.chat_template_kwargs
    if template is not None and template.enable_thinking:
        given["thinking"] = True
        fields["sampling.thinking"] = "chat_template_kwargs.enable_thinking"
    refuse([replace(one, field=path_of(one.field, fields)) for one in violations(given)])
    return Sampling(**given)


def check_stream_options(options: Any, *, stream: bool) -> None:
    """Refuse options without a stream, and obfuscation."""
    if options is None:
        return
    if not stream:
        raise InvalidRequest("stream_options", "is for streams alone; set stream to true")
    if options.include_obfuscation:
        raise InvalidRequest(
            "stream_options.include_obfuscation", "must be false; chunks are sent as they are"
        )
