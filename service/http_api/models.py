"""The requests of the HTTP API as pydantic models: what is accepted, field by field.

A field that is not here is refused. Each field of a request says how it is treated: *honoured*,
*neutral* (only the value that changes nothing), *no effect*, or *refused*. ``docs/http.md`` shows
the same table, and ``/openapi.json`` is made from these models.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from service.http_api.fields import (
    HONOURED,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    NAME,
    NEUTRAL,
    NO_EFFECT,
    REFUSED,
    Count,
    ImageSource,
    Model,
    Number,
    Zero,
    by,
    text_or_object,
    text_or_parts,
    treated,
    word_or_tool,
)

# Messages


class TextPart(Model):
    """A text inside a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Model):
    """An image, and how closely to look at it."""

    url: str = Field(description="A data: URL with base64, such as data:image/png;base64,iVBOR…")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="low bounds the area to 512 x 512 pixels; others take the model's own."
    )


class ImagePart(Model):
    """An image inside a message, at its place between the texts."""

    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[ImageUrl, Tag("<object>")],
        Discriminator(text_or_object),
    ]

    @property
    def source(self) -> ImageSource:
        """Where the image is."""
        if isinstance(self.image_url, str):
            return ImageSource("image_url", self.image_url, None)
        return ImageSource("image_url.url", self.image_url.url, self.image_url.detail)


Texts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    by("type", "text", "image_url"),
]
Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
TextContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Texts, Tag("<parts>")], Discriminator(text_or_parts)
]
AnyContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Parts, Tag("<parts>")], Discriminator(text_or_parts)
]
Name = Annotated[str | None, Field(description="Taken without effect.")]


class SystemMessage(Model):
    """Instructions to the model; the first message only."""

    role: Literal["system", "developer"]
    content: TextContent
    name: Name = None


class UserMessage(Model):
    """What a user says and shows."""

    role: Literal["user"]
    content: AnyContent
    name: Name = None


class FunctionCall(Model):
    """The function that the assistant called, and its arguments as JSON text."""

    name: str = Field(pattern=NAME)
    arguments: str


class ToolCall(Model):
    """A call of a tool that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(Model):
    """An earlier answer of the model."""

    role: Literal["assistant"]
    content: TextContent | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS)
    name: Name = None
    refusal: None = Field(None, description="null only.")
    audio: None = Field(None, description="null only.")
    function_call: None = Field(None, description="null only; use tool_calls.")
    annotations: list[Any] | None = Field(None, description="Taken without effect.")


class ToolMessage(Model):
    """The result of a tool call of an earlier answer."""

    role: Literal["tool"]
    content: AnyContent
    tool_call_id: str


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[SystemMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    by("role", "system", "developer", "user", "assistant", "tool"),
]


# The form of the answer


class TextFormat(Model):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Model):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Model):
    """A JSON Schema. The model does not see name and description; the grammar enforces the schema."""

    name: str | None = Field(None, pattern=NAME)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(
        None, description="Either value: every answer fits the schema, or the call is an error."
    )


class JsonSchemaFormat(Model):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    by("type", "text", "json_object", "json_schema"),
]


class StructuredOutputs(Model):
    """A constraint on the answer in the spelling of vLLM; exactly one of its fields."""

    json_: (
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[dict[str, Any], Tag("<object>")],
            Discriminator(text_or_object),
        ]
        | None
    ) = Field(None, alias="json", description="A JSON Schema, as JSON or as its text.")
    regex: str | None = Field(None, description="A regular expression for the whole answer.")
    choice: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="The texts of which the answer is one."
    )
    grammar: str | None = Field(None, description="An EBNF grammar with a rule named root.")


class FunctionDefinition(Model):
    """A function; its parameters are the schema of the answer when the tool is forced."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Model):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Model):
    """The name of a function among ``tools``."""

    name: str = Field(pattern=NAME)


class NamedTool(Model):
    """The tool that the model has to call."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedTool, Tag("<tool>")],
    Discriminator(word_or_tool),
]


class ChatTemplateOptions(Model):
    """Options of the chat template."""

    enable_thinking: bool | None = Field(
        None,
        description="Let the model write its thoughts before the answer. They are not part of the "
        "answer, but their tokens count.",
    )


class StreamOptions(Model):
    """Options of a stream."""

    include_usage: bool | None = Field(
        None, description="Send the usage in a chunk of its own before the end."
    )
    include_obfuscation: bool | None = Field(
        None, description="false only: nothing is added to hide the size of chunks."
    )


Stops = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Field(fail_fast=True), Tag("<parts>")],
    Discriminator(text_or_parts),
]


class SchemaOptions(Model):
    """What requests of every API may ask of the schema of the answer."""

    require_enforced: bool | None = treated(
        HONOURED,
        "Refuse a schema with keywords that are only checked after generation. Not of OpenAI's "
        "API.",
    )
    close_objects: bool | None = treated(
        HONOURED,
        "Forbid properties that the schema does not list, in objects that say nothing of others. "
        "Not of OpenAI's API.",
    )
    property_order: Literal["declared", "any"] | None = treated(
        HONOURED,
        "Order of the properties of objects in the answer: as the schema lists them, or any. Not of "
        "OpenAI's API.",
    )
    schema_in_prompt: bool | None = treated(
        HONOURED,
        "Show the schema of the answer to the model, with its descriptions. Default: that of the "
        "model. Not of OpenAI's API.",
    )


class ChatRequest(SchemaOptions):
    """A request for an answer to a conversation."""

    hints: ClassVar[dict[str, str]] = {
        "guided_json": "use response_format with the type json_schema",
        "guided_regex": "use structured_outputs.regex",
        "guided_choice": "use structured_outputs.choice",
        "guided_grammar": "use structured_outputs.grammar",
        "guided_decoding_backend": "leave it out; there is one",
        "format": "use response_format",
        "text": "use response_format",
        "json_schema": "use response_format with the type json_schema",
        "schema": "use response_format with the type json_schema",
        "grammar": "use structured_outputs.grammar",
        "ebnf": "use structured_outputs.grammar",
        "regex": "use structured_outputs.regex",
        "json_object": "use response_format with the type json_object",
        "input": "use messages",
        "prompt": "use messages",
        "system": "use a message with the role system",
        "images": "use parts of the type image_url in a message",
        "max_new_tokens": "use max_completion_tokens",
        "max_output_tokens": "use max_completion_tokens",
        "min_p": "use top_p or top_k",
        "strict": "use require_enforced",
        "options": "use the fields of this API, such as temperature",
        "extra_body": "send its fields themselves; an SDK takes them out of extra_body",
    }

    model: str = treated(HONOURED, "Name of the model, as GET /v1/models lists it.", ...)
    messages: list[Message] = treated(
        HONOURED,
        "The conversation; the last message is one of the user or of a tool.",
        ...,
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
    )
    max_completion_tokens: Count | None = treated(HONOURED, "Most tokens of the answer.")
    max_tokens: Count | None = treated(HONOURED, "The older name of max_completion_tokens.")
    temperature: Number | None = treated(HONOURED, "0 to 2; 0, the default, is greedy decoding.")
    top_p: Number | None = treated(HONOURED, "Above 0 and at most 1.")
    top_k: Count | None = treated(HONOURED, "At least 1; 0 and -1 keep all tokens.")
    repetition_penalty: Number | None = treated(HONOURED, "Above 0 and at most 10; 1 is off.")
    seed: int | None = treated(HONOURED, "A 64-bit unsigned integer.")
    stop: Stops | None = treated(
        HONOURED, "Texts before which free text ends; refused with a grammar."
    )
    stream: bool | None = treated(HONOURED, "Send the answer as server-sent events.")
    stream_options: StreamOptions | None = treated(HONOURED, "Options of a stream.")
    response_format: ResponseFormat | None = treated(HONOURED, "The form of the answer.")
    structured_outputs: StructuredOutputs | None = treated(
        HONOURED, "A regular expression, choice, EBNF grammar or JSON Schema (vLLM's spelling)."
    )
    tools: list[Tool] | None = treated(
        HONOURED, "Tools, of which tool_choice forces one.", max_length=MAX_TOOLS, fail_fast=True
    )
    tool_choice: ToolChoice | None = treated(
        HONOURED, "A named function, required with one tool, or none; auto is refused with tools."
    )
    chat_template_kwargs: ChatTemplateOptions | None = treated(
        HONOURED,
        "Options of the chat template (vLLM's spelling): enable_thinking, for models whose thinking "
        "is optional and answers without a grammar.",
    )
    task: str | None = treated(
        HONOURED,
        "Name of a registered task, in place of the texts of the messages. Not of OpenAI's API.",
    )
    accept_empty: bool | None = treated(
        HONOURED, "Accept an answer of a task that says nothing. Not of OpenAI's API."
    )
    n: Annotated[int, Field(ge=1, le=1)] | None = treated(
        NEUTRAL, "Must be 1; send a request for each answer."
    )
    logprobs: Literal[False] | None = treated(NEUTRAL, "Must be false; there are no probabilities.")
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = treated(
        NEUTRAL, "Must be 0; there are no probabilities."
    )
    frequency_penalty: Zero | None = treated(NEUTRAL, "Must be 0; use repetition_penalty.")
    presence_penalty: Zero | None = treated(NEUTRAL, "Must be 0; use repetition_penalty.")
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = treated(
        NEUTRAL, "Must be empty; use structured_outputs to constrain the answer."
    )
    store: Literal[False] | None = treated(NEUTRAL, "Must be false; nothing is stored.")
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = (
        treated(NEUTRAL, 'Must be ["text"]; answers are text.')
    )
    service_tier: Literal["auto", "default"] | None = treated(
        NEUTRAL, "Must be auto or default; there is one tier."
    )
    reasoning_effort: Literal["none"] | None = treated(
        NEUTRAL, "Must be none; thoughts are never part of an answer."
    )
    verbosity: Literal["medium"] | None = treated(
        NEUTRAL, "Must be medium; ask for a short or a long answer in a message."
    )
    parallel_tool_calls: bool | None = treated(NO_EFFECT, "A forced tool is called exactly once.")
    user: str | None = treated(NO_EFFECT, "Not used; the API key tells who calls.")
    safety_identifier: str | None = treated(NO_EFFECT, "Not used.")
    metadata: dict[str, Any] | None = treated(NO_EFFECT, "Not used, as nothing is stored.")
    prompt_cache_key: str | None = treated(NO_EFFECT, "Not used.")
    prompt_cache_retention: str | None = treated(NO_EFFECT, "Not used.")
    audio: None = treated(REFUSED, "Not supported; answers are text.")
    function_call: None = treated(REFUSED, "Not supported; use tool_choice.")
    functions: None = treated(REFUSED, "Not supported; use tools.")
    moderation: None = treated(REFUSED, "Not supported; nothing is moderated.")
    prediction: None = treated(REFUSED, "Not supported; leave it out.")
    prompt_cache_options: None = treated(REFUSED, "Not supported; leave it out.")
    web_search_options: None = treated(REFUSED, "Not supported; nothing is searched.")
