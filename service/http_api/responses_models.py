"""The request of OpenAI's Responses API as a pydantic model, in the form of ``models.py``."""

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
    by,
    text_or_parts,
    treated,
    word_or_tool,
)
from service.http_api.models import (
    ChatTemplateOptions,
    JsonObjectFormat,
    SchemaOptions,
    StructuredOutputs,
    TextFormat,
)

MAX_METADATA = 16

# Parts of messages


class InputText(Model):
    """A text that is sent to the model."""

    type: Literal["input_text"]
    text: str


class InputImage(Model):
    """An image inside a message, at its place between the texts."""

    type: Literal["input_image"]
    image_url: str = Field(
        description="A data: URL with base64, such as data:image/png;base64,iVBOR…"
    )
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="low bounds the area to 512 x 512 pixels; others take the model's own."
    )
    file_id: None = Field(None, description="null only: no files are stored.")

    @property
    def source(self) -> ImageSource:
        """Where the image is."""
        return ImageSource("image_url", self.image_url, self.detail)


class OutputText(Model):
    """A text of an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = Field(None, description="Taken without effect.")
    logprobs: list[Any] | None = Field(None, description="Taken without effect.")


InputParts = Annotated[
    list[
        Annotated[
            Annotated[InputText, Tag("<input_text>")] | Annotated[InputImage, Tag("<input_image>")],
            by("type", "input_text", "input_image"),
        ]
    ],
    Field(min_length=1, max_length=MAX_PARTS, fail_fast=True),
]
InputTexts = Annotated[list[InputText], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
OutputTexts = Annotated[
    list[
        Annotated[
            Annotated[OutputText, Tag("<output_text>")] | Annotated[InputText, Tag("<input_text>")],
            by("type", "output_text", "input_text"),
        ]
    ],
    Field(min_length=1, max_length=MAX_PARTS, fail_fast=True),
]
AnyContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[InputParts, Tag("<parts>")],
    Discriminator(text_or_parts),
]

# Items of the input


class Item(Model):
    """What all items may have, as answers have it; all of it is taken without effect."""

    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class InstructionItem(Item):
    """Instructions to the model; the first item only, and only without ``instructions``."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[InputTexts, Tag("<parts>")],
        Discriminator(text_or_parts),
    ]


class UserItem(Item):
    """What a user says and shows."""

    type: Literal["message"] = "message"
    role: Literal["user"]
    content: AnyContent


class AssistantItem(Item):
    """An earlier answer of the model."""

    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[OutputTexts, Tag("<parts>")],
        Discriminator(text_or_parts),
    ]
    phase: Literal["commentary", "final_answer"] | None = Field(
        None, description="Taken without effect."
    )


class FunctionCallItem(Item):
    """A call of a function in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str = Field(pattern=NAME)
    arguments: str


class FunctionOutputItem(Item):
    """The result of a call of an earlier answer."""

    type: Literal["function_call_output"]
    call_id: str
    output: AnyContent


MessageItem = Annotated[
    Annotated[InstructionItem, Tag("<system>")]
    | Annotated[InstructionItem, Tag("<developer>")]
    | Annotated[UserItem, Tag("<user>")]
    | Annotated[AssistantItem, Tag("<assistant>")],
    by("role", "system", "developer", "user", "assistant"),
]
InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionOutputItem, Tag("<function_call_output>")],
    by("type", "message", "function_call", "function_call_output", otherwise="message"),
]
InputItems = Annotated[
    list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]

# The form of the answer


class SchemaFormat(Model):
    """JSON that fits a schema. The model does not see name and description."""

    type: Literal["json_schema"]
    name: str | None = Field(None, pattern=NAME)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(
        None, description="Either value: every answer fits the schema, or the call is an error."
    )


class TextConfig(Model):
    """The form of an answer that is a text."""

    format: (
        Annotated[
            Annotated[TextFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[SchemaFormat, Tag("<json_schema>")],
            by("type", "text", "json_object", "json_schema"),
        ]
        | None
    ) = None
    verbosity: Literal["medium"] | None = Field(
        None, description="medium only; ask for a short or a long answer in a message."
    )


class FunctionTool(Model):
    """A function; its parameters are the schema of the answer when the tool is forced."""

    type: Literal["function"]
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Model):
    """The function that the model has to call."""

    type: Literal["function"]
    name: str = Field(pattern=NAME)


class Reasoning(Model):
    """Thoughts are never part of an answer."""

    effort: Literal["none"] | None = None
    summary: None = None
    generate_summary: None = None


class ResponsesStreamOptions(Model):
    """Options of a stream."""

    include_obfuscation: bool | None = Field(
        None, description="false only: nothing is added to hide the size of events."
    )


class ResponsesRequest(SchemaOptions):
    """A request for an answer to a conversation, in the form of the Responses API. Nothing is stored."""

    hints: ClassVar[dict[str, str]] = {
        "messages": "use input",
        "response_format": "use text.format",
        "format": "use text.format",
        "json_schema": "use text.format with the type json_schema",
        "max_tokens": "use max_output_tokens",
        "max_completion_tokens": "use max_output_tokens",
        "max_new_tokens": "use max_output_tokens",
        "system": "use instructions",
        "images": "use parts of the type input_image in an item of input",
        "reasoning_effort": "use reasoning.effort",
        "verbosity": "use text.verbosity",
        "stop": "use POST /v1/chat/completions for stop",
        "task": "use POST /v1/chat/completions for a registered task",
        "n": "send a request for each answer",
        "strict": "use require_enforced",
        "guided_json": "use text.format with the type json_schema",
        "guided_regex": "use structured_outputs.regex",
        "guided_choice": "use structured_outputs.choice",
        "guided_grammar": "use structured_outputs.grammar",
        "extra_body": "send its fields themselves; an SDK takes them out of extra_body",
    }

    model: str = treated(HONOURED, "Name of the model, as GET /v1/models lists it.", ...)
    input: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[InputItems, Tag("<parts>")],
        Discriminator(text_or_parts),
    ] = treated(
        HONOURED,
        "A text of the user, or the conversation, which ends with the user or a tool.",
        ...,
    )
    instructions: str | None = treated(HONOURED, "The system message of the conversation.")
    max_output_tokens: Count | None = treated(HONOURED, "Most tokens of the answer.")
    temperature: Number | None = treated(HONOURED, "0 to 2; 0, the default, is greedy decoding.")
    top_p: Number | None = treated(HONOURED, "Above 0 and at most 1.")
    top_k: Count | None = treated(
        HONOURED, "At least 1; 0 and -1 keep all tokens. Not of OpenAI's API."
    )
    repetition_penalty: Number | None = treated(
        HONOURED, "Above 0 and at most 10; 1 is off. Not of OpenAI's API."
    )
    seed: int | None = treated(HONOURED, "A 64-bit unsigned integer. Not of OpenAI's API.")
    stream: bool | None = treated(HONOURED, "Send the answer as server-sent events.")
    stream_options: ResponsesStreamOptions | None = treated(HONOURED, "Options of a stream.")
    text: TextConfig | None = treated(HONOURED, "The form of the answer.")
    structured_outputs: StructuredOutputs | None = treated(
        HONOURED,
        "A regular expression, choice, EBNF grammar or JSON Schema (vLLM's spelling). Not of "
        "OpenAI's API.",
    )
    tools: list[FunctionTool] | None = treated(
        HONOURED,
        "Functions, of which tool_choice forces one.",
        max_length=MAX_TOOLS,
        fail_fast=True,
    )
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<word>")]
            | Annotated[NamedFunction, Tag("<tool>")],
            Discriminator(word_or_tool),
        ]
        | None
    ) = treated(
        HONOURED, "A named function, required with one tool, or none; auto is refused with tools."
    )
    chat_template_kwargs: ChatTemplateOptions | None = treated(
        HONOURED,
        "Options of the chat template (vLLM's spelling): enable_thinking, for models whose thinking "
        "is optional and answers without a grammar. Not of OpenAI's API.",
    )
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=MAX_METADATA),
        ]
        | None
    ) = treated(HONOURED, "Repeated in the answer; at most 16 texts.")
    store: Literal[False] | None = treated(
        NEUTRAL, "Must be false or absent; either way nothing is stored."
    )
    background: Literal[False] | None = treated(
        NEUTRAL, "Must be false; the answer comes in the response to this request."
    )
    include: list[Literal["reasoning.encrypted_content"]] | None = treated(
        NEUTRAL,
        "Must be empty or have reasoning.encrypted_content, of which there is none; nothing else "
        "can be included.",
    )
    reasoning: Reasoning | None = treated(
        NEUTRAL,
        "Must have the effort none; thoughts are never part of an answer. "
        "chat_template_kwargs.enable_thinking lets the model write them.",
    )
    service_tier: Literal["auto", "default"] | None = treated(
        NEUTRAL, "Must be auto or default; there is one tier."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = treated(
        NEUTRAL, "Must be 0; there are no probabilities."
    )
    truncation: Literal["disabled"] | None = treated(
        NEUTRAL, "Must be disabled; a conversation that is too long is an error."
    )
    max_tool_calls: int | None = treated(
        NO_EFFECT, "Limits tools that run in the server, of which there are none."
    )
    parallel_tool_calls: bool | None = treated(NO_EFFECT, "A forced tool is called exactly once.")
    prompt_cache_key: str | None = treated(NO_EFFECT, "Not used.")
    prompt_cache_retention: str | None = treated(NO_EFFECT, "Not used.")
    safety_identifier: str | None = treated(NO_EFFECT, "Not used.")
    user: str | None = treated(NO_EFFECT, "Not used; the API key tells who calls.")
    access_programs: None = treated(REFUSED, "Not supported; leave it out.")
    context_management: None = treated(REFUSED, "Not supported; nothing is left out of the input.")
    conversation: None = treated(
        REFUSED, "Not supported, as nothing is stored; send the whole conversation as input."
    )
    image: None = treated(REFUSED, "Not supported; leave it out.")
    moderation: None = treated(REFUSED, "Not supported; nothing is moderated.")
    previous_response_id: None = treated(
        REFUSED, "Not supported, as nothing is stored; send the whole conversation as input."
    )
    prompt: None = treated(REFUSED, "Not supported; send instructions and input.")
    prompt_cache_options: None = treated(REFUSED, "Not supported; leave it out.")
