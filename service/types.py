"""Plain values that cross the seams between API, tasks and engines. No proto, torch or LMDeploy here."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pixels = npt.NDArray[np.uint8]
    """(height, width, 3) uint8, RGB, C-contiguous, upright."""

T = TypeVar("T")


class GrammarKind(enum.Enum):
    """The ways in which the text of an answer can be constrained."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    EBNF = "ebnf"
    CHOICE = "choice"


class PropertyOrder(enum.Enum):
    """The order of the properties of objects in an answer that a JSON schema constrains."""

    DECLARED = "declared"
    """As in the schema: the first name under ``properties`` comes first."""
    ANY = "any"
    """Any, for objects of few names; else as declared, and the report says so."""


class FinishReason(enum.Enum):
    """Why generation ended. LENGTH and LOOP mean that the text was cut.

    STOP_TEXT: before a stop text of the caller; engines never say so, see `service.inference.stops`.
    """

    STOP = "stop"
    STOP_TEXT = "stop_text"
    LENGTH = "length"
    LOOP = "loop"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the answer.

    ``source`` is the JSON schema as text, the regular expression or the EBNF grammar (root rule ``root``);
    for CHOICE it is a JSON array of the allowed strings. Text, so that a grammar is hashable and can be cached.
    ``ebnf`` is the grammar that stands for it in engines, once it has been analysed; empty before.
    ``forces_little``: no text longer than some thousand characters can be the only one that fits next.
    ``property_order``: of a JSON schema; None leaves it to the server.
    """

    kind: GrammarKind
    source: str
    ebnf: str = ""
    forces_little: bool = False
    property_order: PropertyOrder | None = None

    def with_defaults(self, property_order: PropertyOrder) -> Grammar:
        """The grammar with the server's order of properties where it has none, and needs one."""
        if self.property_order is not None or self.kind is not GrammarKind.JSON_SCHEMA:
            return self
        return replace(self, property_order=property_order)


DEFAULT_MAX_TOKENS = 1024
"""Most tokens of an answer where the caller did not say, as far as the context has room."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy decoding.

    temperature: 0 is greedy, at most 2. top_p: in (0, 1]. top_k: 0 keeps all tokens.
    repetition_penalty: in (0, 10], 1 is off. seed: uint64, None lets the engine draw one.
    max_tokens: at least 1; None takes ``DEFAULT_MAX_TOKENS``, or what is left of the context.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def answer_limit(self, room: int) -> int:
        """Most tokens of the answer. room: tokens that the prompt leaves of the context."""
        return min(DEFAULT_MAX_TOKENS, room) if self.max_tokens is None else self.max_tokens


class ImageSource(Protocol):
    """An image of a request, which gives its pixels when an engine asks for them.

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

    async def reduced(self, reduce: Callable[[Pixels], T]) -> T:
        """The result of ``reduce``, called with the pixels in another thread; they are freed then.

        Every call decodes the image again. Raises ``ImageError`` for a damaged file, ``Overloaded``
        where memory does not suffice, and what ``reduce`` raises.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """An upright image that is decoded already; an ``ImageSource``.

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

    async def reduced(self, reduce: Callable[[Pixels], T]) -> T:
        """``reduce`` of the pixels, in another thread."""
        return await asyncio.to_thread(reduce, self.pixels)


@dataclass(slots=True)
class EncodedImage:
    """An image as it came: the path of its field, the bytes of a file, bounds of the area.

    data: emptied when the call is over.
    """

    field: str
    data: bytes
    min_pixels: int | None = None
    max_pixels: int | None = None


class Role(enum.Enum):
    """Who speaks in a message of a conversation."""

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
    """An image inside a message, at its place between the texts.

    image: None only in a task, where the next image of the request takes the place.
    """

    image: ImageSource | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the assistant made. ``arguments``: a JSON object as text, kept as it was written."""

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
    tool_calls: only in messages of the assistant, behind its text.
    """

    role: Role
    parts: tuple[TextPart | ImagePart, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """One prompt for an engine, either as ``messages`` or in the short form.

    The short form is a system text, then one user turn of all images followed by the text. messages:
    the whole conversation; the fields of the short form are then empty. tools: what the model may
    call, as the chat template lists them.
    """

    request_id: str
    user: str = ""
    system: str = ""
    images: tuple[ImageSource, ...] = ()
    grammar: Grammar | None = None
    sampling: Sampling = Sampling()
    messages: tuple[Message, ...] = ()
    tools: tuple[ToolDefinition, ...] = ()

    def __post_init__(self) -> None:
        if self.messages and (self.user or self.system or self.images):
            raise ValueError("a request has messages or the short form, not both")

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages, whichever form the request has."""
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
    """A system text if there is one, examples, then one user turn of all images and the text."""
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
    """Seconds since the engine got the request: wait in its queue, first token, end."""

    queue_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. The last chunk of a request, and only it, has a finish reason and timings.

    ``text`` never splits a character; it may be empty. ``usage``: tokens up to and with this chunk.
    """

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage = Usage()
    timings: Timings = Timings()


class Modality(enum.Enum):
    """What a prompt may be made of."""

    TEXT = "text"
    IMAGE = "image"


TEXT_ONLY = frozenset({Modality.TEXT})
TEXT_AND_IMAGES = frozenset({Modality.TEXT, Modality.IMAGE})


class Enforcer(enum.Enum):
    """What keeps an answer to its grammar."""

    MASK = "mask"
    """The engine, which rules out every token that does not fit."""
    VALIDATION = "validation"
    """Nothing before the finished answer is validated: the engine does not enforce grammars."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do. A request beyond it is refused before it reaches the engine."""

    model: str
    engine: str
    modalities: frozenset[Modality]
    grammar_kinds: frozenset[GrammarKind]
    sampling_options: frozenset[str]
    """Names of the fields of Sampling that the engine honours."""
    context_length: int
    """Tokens of prompt and answer together."""
    max_images: int
    """Images in one request."""
    enforcer: Enforcer = Enforcer.MASK
    details: Mapping[str, str] = field(default_factory=dict)
    """Whatever an operator wants to see in GetModel: dtype, device, DeepStack mode, versions."""
