"""Plain values that the API, tasks and engines exchange. Never imports proto, torch or LMDeploy."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pixels = npt.NDArray[np.uint8]
    """(height, width, 3) uint8, RGB, C-contiguous, upright."""

T = TypeVar("T")


class ImageRows(Protocol):
    """An upright RGB image of shape (height, width, 3), uint8, that gives its rows on demand.

    ``rows[top:bottom]`` is an array of these rows. Read a large image in strips: it then needs no
    second copy. A numpy array is one, and ``np.asarray`` makes one of any.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, rows: slice, /) -> Pixels: ...


class GrammarKind(enum.Enum):
    """The ways in which the text of an answer can be constrained."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    EBNF = "ebnf"
    CHOICE = "choice"


class PropertyOrder(enum.Enum):
    """The order of the properties of objects in an answer that a JSON schema constrains."""

    DECLARED = "declared"
    """In the order in which ``properties`` of the schema lists them."""
    ANY = "any"
    """Any order, for objects with few properties; larger objects use DECLARED, and the report says
    so."""


class FinishReason(enum.Enum):
    """Why generation ended. LENGTH and LOOP mean that the text was cut.

    STOP_TEXT: before a stop text of the caller; set by `service.inference.stops`, never by an
    engine.
    """

    STOP = "stop"
    STOP_TEXT = "stop_text"
    LENGTH = "length"
    LOOP = "loop"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the answer.

    source: the JSON schema as text, the regular expression, or the EBNF grammar (root rule
        ``root``); for CHOICE a JSON array of the allowed strings. Always text, so that a grammar is
        hashable and can be cached. The analysis replaces a schema by the one with closed objects.
    ebnf: the equivalent grammar for engines, set by the analysis; empty before.
    forces_little: the grammar never forces more than a few thousand characters in a row.
    property_order: order of properties for a JSON schema; None uses the server's default.
    close_objects: for a JSON schema, forbid names that are not in ``properties`` where the schema
        says nothing of them; None uses the server's default.
    prompt_schema: a JSON schema as a model reads it in its prompt, set by the analysis.
    lengths_beside: for a JSON schema, leave lengths of strings to the engine, which has to declare
        `Capabilities.limits_lengths`.
    lengths: the limits that the engine has to keep in addition to the EBNF, see
        ``service.schema_compiler.emit.length_plan``; set by the analysis, empty where there are none.
    """

    kind: GrammarKind
    source: str
    ebnf: str = ""
    forces_little: bool = False
    property_order: PropertyOrder | None = None
    close_objects: bool | None = None
    prompt_schema: str = ""
    lengths_beside: bool = False
    lengths: bytes = b""

    def with_defaults(
        self, property_order: PropertyOrder, close_objects: bool, lengths_beside: bool = False
    ) -> Grammar:
        """The grammar, with the server's options if it is a JSON schema without its own.
        lengths_beside: whether the engine limits lengths."""
        if self.kind is not GrammarKind.JSON_SCHEMA:
            return self
        if self.property_order is not None:
            property_order = self.property_order
        if self.close_objects is not None:
            close_objects = self.close_objects
        return replace(
            self,
            property_order=property_order,
            close_objects=close_objects,
            lengths_beside=lengths_beside,
        )


DEFAULT_MAX_TOKENS = 1024
"""Maximum number of answer tokens if the caller sets none; less if the context has less room."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling options. The defaults mean greedy decoding.

    temperature: 0 is greedy, at most 2. top_p: in (0, 1]. top_k: 0 keeps all tokens.
    repetition_penalty: in (0, 10], 1 is off. seed: uint64, None lets the engine draw one.
    max_tokens: at least 1; None takes ``DEFAULT_MAX_TOKENS``, or what is left of the context.
    thinking: the model writes its thoughts before the answer. They are not part of the answer, but
        their tokens count. Only for an answer without a grammar.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    thinking: bool = False

    def answer_limit(self, room: int) -> int:
        """Maximum number of answer tokens. room: tokens of the context that the prompt leaves
        free."""
        return min(DEFAULT_MAX_TOKENS, room) if self.max_tokens is None else self.max_tokens


@dataclass(frozen=True, slots=True)
class ImageFile:
    """The file of an image as it was received.

    format: "JPEG", "PNG", "WebP" or "HEIC". plain: an upright JPEG or PNG file of 8-bit RGB, without
    transparency or colour profile, which every decoder reads the same.
    """

    data: bytes
    format: str
    plain: bool


class ImageSource(Protocol):
    """An image of a request, which is decoded when an engine asks for its pixels.

    width, height: of the upright image, in pixels; known before anything is decoded.
    min_pixels, max_pixels: bounds of the area after resizing, in pixels; None takes the model's own.
    """

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def min_pixels(self) -> int | None: ...
    @property
    def max_pixels(self) -> int | None: ...

    async def file(self) -> ImageFile | None:
        """The file of the image, not decoded; None where there are only pixels.

        Raises ``ImageError`` for a truncated file.
        """
        ...

    async def reduced(self, reduce: Callable[[ImageRows], T], needs_bytes: int = 0) -> T:
        """Decode the image, call ``reduce`` with it in another thread, and return the result. The
        image is then freed.

        needs_bytes: memory that ``reduce`` takes beside the image. Every call decodes the image
        again. Raises ``ImageError`` for a damaged file, ``Overloaded`` when there is not enough
        memory, and the errors of ``reduce``.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """An ``ImageSource`` whose image is already decoded and upright.

    pixels: (height, width, 3) uint8, RGB, C-contiguous.
    """

    pixels: Pixels
    min_pixels: int | None = None
    max_pixels: int | None = None

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    async def file(self) -> ImageFile | None:
        """None: there are only pixels."""
        return None

    async def reduced(self, reduce: Callable[[ImageRows], T], needs_bytes: int = 0) -> T:
        """Call ``reduce`` with the pixels in another thread and return its result."""
        return await asyncio.to_thread(reduce, self.pixels)


@dataclass(slots=True)
class EncodedImage:
    """An image as received: the path of its field, the bytes of its file, and bounds of its area.

    data: cleared when the call ends.
    """

    field: str
    data: bytes
    min_pixels: int | None = None
    max_pixels: int | None = None


class Role(enum.Enum):
    """The author of a message in a conversation."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text inside a message. The text never becomes a turn, an image placeholder or another special token."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class ImagePart:
    """An image inside a message, between its texts.

    image: None only in a task, where it stands for the next image of the request.
    """

    image: ImageSource | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of the assistant. ``arguments``: a JSON object as text, unchanged."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A tool that the model may call. ``parameters``: the JSON Schema of its arguments, as text."""

    name: str
    parameters: str
    description: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One message of a conversation.

    parts: texts and images in reading order; images only in messages of users and tools.
    tool_calls: only in messages of the assistant, after its text.
    """

    role: Role
    parts: tuple[TextPart | ImagePart, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """One prompt for an engine, either as ``messages`` or in the short form.

    The short form is a system text, then one user turn with all images followed by the text.
    messages: the whole conversation; the fields of the short form are then empty. tools: tools that
    the model may call, rendered as the chat template does. enforced: the caller was told that the
    engine enforces the grammar, so nothing that only checks answers may answer. deadline: time of the
    event loop's clock after which nobody waits for the answer; None where there is none. piecewise:
    the text is read while it is generated; otherwise the engine may give it in one piece. joinable:
    text that is ready at the same time may be one chunk; not where the answer may end within it,
    because its tokens are counted up to there.
    """

    request_id: str
    user: str = ""
    system: str = ""
    images: tuple[ImageSource, ...] = ()
    grammar: Grammar | None = None
    sampling: Sampling = Sampling()
    messages: tuple[Message, ...] = ()
    tools: tuple[ToolDefinition, ...] = ()
    enforced: bool = False
    deadline: float | None = None
    piecewise: bool = True
    joinable: bool = True

    def __post_init__(self) -> None:
        if self.messages and (self.user or self.system or self.images):
            raise ValueError("a request has messages or the short form, not both")

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages of the conversation, for both forms."""
        if self.messages:
            return self.messages
        return short_conversation(self.system, self.images, self.user)

    @property
    def all_images(self) -> tuple[ImageSource, ...]:
        """The images of the conversation, in the order of the prompt."""
        if not self.messages:
            return self.images
        found = []
        for part in image_parts(self.messages):
            assert part.image is not None, (
                "the places of images are filled before an engine sees them"
            )
            found.append(part.image)
        return tuple(found)


def short_conversation(
    system: str,
    images: Iterable[ImageSource],
    user: str,
    examples: Iterable[Message] = (),
) -> tuple[Message, ...]:
    """The short form as messages: the system text if there is one, examples, then one user turn
    with all images and the text."""
    first = (Message(Role.SYSTEM, (TextPart(system),)),) if system else ()
    return (*first, *examples, Message(Role.USER, (*map(ImagePart, images), TextPart(user))))


def image_parts(messages: Iterable[Message]) -> Iterator[ImagePart]:
    """The images of a conversation, in the order of the prompt."""
    for message in messages:
        for part in message.parts:
            if isinstance(part, ImagePart):
                yield part


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request. ``prompt_tokens`` includes ``image_tokens``."""

    prompt_tokens: int = 0
    image_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds since the engine received the request: end of the wait in its queue, first token,
    end."""

    queue_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an answer. Only the last chunk of a request has a finish reason and timings.

    ``text`` never splits a character; it may be empty. ``usage``: tokens up to and including this
    chunk.
    """

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage = Usage()
    timings: Timings = Timings()


class Modality(enum.Enum):
    """A kind of content that a prompt may contain."""

    TEXT = "text"
    IMAGE = "image"


TEXT_ONLY = frozenset({Modality.TEXT})
TEXT_AND_IMAGES = frozenset({Modality.TEXT, Modality.IMAGE})


class Enforcer(enum.Enum):
    """The component that makes an answer match its grammar."""

    MASK = "mask"
    """The engine, which masks every token that the grammar does not allow."""
    VALIDATION = "validation"
    """Only the validation of the finished answer: the engine does not enforce grammars."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The features of an engine. A request that needs others is refused before it reaches the
    engine."""

    model: str
    engine: str
    modalities: frozenset[Modality]
    grammar_kinds: frozenset[GrammarKind]
    sampling_options: frozenset[str]
    """Names of the fields of ``Sampling`` that the engine supports."""
    context_length: int
    """Maximum number of tokens of prompt and answer together; 0 where that is not known."""
    max_images: int
    """Maximum number of images in one request."""
    enforcer: Enforcer = Enforcer.MASK
    limits_lengths: bool = False
    """Whether the masks of the engine keep `Grammar.lengths`."""
    not_enforced: str = ""
    """Why the engine does not enforce grammars, for people; empty where it does."""
    schema_in_prompt: bool = False
    """Whether the prompt has the JSON schema of the answer where the caller does not say."""
    restart_helps: bool = True
    """Whether a new process may cure an engine that makes no progress. False for an engine whose model
    runs elsewhere."""
    details: Mapping[str, str] = field(default_factory=dict)
    """Details for operators, shown by GetModel: dtype, device, DeepStack mode, versions."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is.

    running: requests in its batch. waiting: requests that it has and that wait for a place in the
    batch. kv_cache_used: part of the key-value cache that cannot be given to a new request, 0 to 1;
    None where the engine cannot tell.
    """

    model: str
    running: int
    waiting: int
    kv_cache_used: float | None = None
