"""An engine without a model: scripted answers, delays and failures on demand.

Used in tests, to try out a client, and to measure the overhead of the server itself. It is part of
the package: ``engine=fake``.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.engines.common.context import answer_limit
from service.engines.common.reducing import reduce_all
from service.engines.kind import EngineKind, EngineSettings
from service.errors import (
    EngineUnavailable,
    GrammarError,
    Overloaded,
    TooManyImages,
    VisionDisabled,
)
from service.types import (
    TEXT_AND_IMAGES,
    TEXT_ONLY,
    Capabilities,
    Chunk,
    Enforcer,
    EngineLoad,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    ImageRows,
    ImageSource,
    TextPart,
    Timings,
    Usage,
)

PIECE = re.compile(r"\s*\S{1,8}|\s+")
"""A token of the fake engine: up to eight characters with the spaces before them."""
ROOT_RULE = re.compile(r"^\s*root\s*::=", re.MULTILINE)
PIXELS_PER_TOKEN = 32 * 32
MAX_IMAGES = 1024
DEPTH_LIMIT = 64
SAMPLING_OPTIONS = frozenset(
    {"max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"}
)


class FakeEngine:
    """Answers every request with a scripted text.

    answer: the text, or a function of the request. None answers a JSON schema with a small
        instance, a choice with its first option and anything else with a fixed sentence. Answers
        are deterministic, so ``max_tokens`` is the only sampling option with an effect.
    token_delay_s, start_delay_s: delay before each token, and of ``start``.
    max_images: maximum number of images in a request.
    max_active: maximum number of concurrent requests; further requests are refused with
        ``Overloaded``. None means no limit.
    grammar_kinds, sampling_options, enforcer, schema_in_prompt: the declared capabilities.
    Failures can be set at any time: the engine raises a RuntimeError after ``crash_after`` tokens,
    produces nothing more after ``hang_after`` tokens, and fails its health check while ``healthy``
    is False.
    """

    def __init__(
        self,
        answer: str | Callable[[GenerateRequest], str] | None = None,
        *,
        token_delay_s: float = 0.0,
        start_delay_s: float = 0.0,
        context_length: int = 32_768,
        vision: bool = True,
        max_images: int = MAX_IMAGES,
        max_active: int | None = None,
        enforcer: Enforcer = Enforcer.MASK,
        grammar_kinds: Iterable[GrammarKind] = GrammarKind,
        sampling_options: Iterable[str] = SAMPLING_OPTIONS,
        schema_in_prompt: bool = False,
    ) -> None:
        self.answer = answer
        self.token_delay_s = token_delay_s
        self.start_delay_s = start_delay_s
        self.context_length = context_length
        self.vision = vision
        self.max_images = max_images
        self.max_active = max_active
        self.enforcer = enforcer
        self.grammar_kinds = frozenset(grammar_kinds)
        self.sampling_options = frozenset(sampling_options)
        self.schema_in_prompt = schema_in_prompt
        self.crash_after: int | None = None
        self.hang_after: int | None = None
        self.healthy = True
        self.kv_cache_used: float | None = None
        self.active_requests = 0
        self.finished_requests = 0
        self.cancelled_requests = 0
        self._compiled: dict[Grammar, str] = {}
        self._started = False
        self._closed = asyncio.Event()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            model="fake",
            engine="fake",
            modalities=TEXT_AND_IMAGES if self.vision else TEXT_ONLY,
            grammar_kinds=self.grammar_kinds,
            sampling_options=self.sampling_options,
            context_length=self.context_length,
            max_images=self.max_images if self.vision else 0,
            enforcer=self.enforcer,
            schema_in_prompt=self.schema_in_prompt,
            details={"device": "none"},
        )

    async def load(self) -> EngineLoad | None:
        if not self._started:
            return None
        return EngineLoad(self.capabilities.model, self.active_requests, 0, self.kv_cache_used)

    async def start(self) -> None:
        if not self._started:
            await asyncio.sleep(self.start_delay_s)
            self._started = True

    async def prepare(self, grammar: Grammar) -> None:
        """Read the grammar and cache its answer, as a real engine caches the compiled grammar."""
        self._check_ready()
        if grammar not in self._compiled:
            if len(self._compiled) >= 256:
                self._compiled.clear()
            self._compiled[grammar] = scripted(grammar)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        started = time.perf_counter()
        self._check(request)
        pieces = PIECE.findall(await self._text(request))
        prompt = prompt_size(request)
        limit = answer_limit(
            prompt.prompt_tokens,
            request.sampling,
            self.context_length,
            image_tokens=0 if request.messages else prompt.image_tokens,
        )
        await reduce_all(request.all_images, _looked_at)
        self.active_requests += 1
        first_s = 0.0
        size = prompt.prompt_tokens, prompt.image_tokens
        try:
            for number, piece in enumerate(pieces[:limit]):
                await self._step(number)
                first_s = first_s or time.perf_counter() - started
                yield Chunk(piece, usage=Usage(*size, number + 1))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled_requests += 1
            raise
        finally:
            self.active_requests -= 1
        self.finished_requests += 1
        cut = len(pieces) > limit
        yield Chunk(
            "",
            FinishReason.LENGTH if cut else FinishReason.STOP,
            replace(prompt, output_tokens=min(len(pieces), limit)),
            Timings(0.0, first_s, time.perf_counter() - started),
        )

    async def check_health(self) -> None:
        self._check_ready()
        if not self.healthy:
            raise EngineUnavailable("The engine does not answer.", reason="ENGINE_UNHEALTHY")

    async def close(self) -> None:
        self._closed.set()
        self._compiled.clear()

    def _check_ready(self) -> None:
        if self._closed.is_set():
            raise _closed_error()
        if not self._started:
            raise EngineUnavailable("The engine is not ready yet.", reason="ENGINE_LOADING")

    def _check(self, request: GenerateRequest) -> None:
        self._check_ready()
        if request.all_images and not self.vision:
            raise VisionDisabled("The fake engine was made without vision; send text only.")
        if len(request.all_images) > self.max_images:
            raise TooManyImages(len(request.all_images), self.max_images)
        if self.max_active is not None and self.active_requests >= self.max_active:
            raise Overloaded("Too many requests are running; try again later.", retry_after_s=1.0)

    async def _text(self, request: GenerateRequest) -> str:
        scripted_text = "This is the fake engine."
        if request.grammar is not None:
            await self.prepare(request.grammar)
            scripted_text = self._compiled[request.grammar]
        if callable(self.answer):
            return self.answer(request)
        return scripted_text if self.answer is None else self.answer

    async def _step(self, number: int) -> None:
        if self.crash_after is not None and number >= self.crash_after:
            raise RuntimeError("fake engine: crash in /secret/path at 0x7f0000000000")
        if self.hang_after is not None and number >= self.hang_after:
            await self._closed.wait()
        if self.token_delay_s:
            await asyncio.sleep(self.token_delay_s)
        if self._closed.is_set():
            raise _closed_error()


def _closed_error() -> EngineUnavailable:
    return EngineUnavailable("The engine is closed.", reason="ENGINE_CLOSED")


def _looked_at(index: int, image: ImageSource, rows: ImageRows) -> None:
    """Decode the images, so that damaged files fail in this engine, too."""


def prompt_size(request: GenerateRequest) -> Usage:
    """The number of tokens of the prompt and of its images."""
    image_tokens = sum(image_size(image) for image in request.all_images)
    parts = [part for message in request.conversation for part in message.parts]
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    return Usage(image_tokens + sum(len(PIECE.findall(text)) for text in texts), image_tokens)


def image_size(image: ImageSource) -> int:
    """The number of tokens of an image: one per 32 x 32 pixels of its area within its bounds."""
    area: float = max(image.width * image.height, image.min_pixels or 0)
    if image.max_pixels is not None:
        area = min(area, image.max_pixels)
    return max(1, round(area / PIXELS_PER_TOKEN))


def scripted(grammar: Grammar) -> str:
    """A text that matches a grammar. Raises ``GrammarError`` when the grammar cannot be read."""
    try:
        if grammar.kind is GrammarKind.JSON_SCHEMA:
            schema = json.loads(grammar.source)
            return json.dumps(instance(schema, schema), ensure_ascii=False)
        if grammar.kind is GrammarKind.CHOICE:
            return str(json.loads(grammar.source)[0])
        if grammar.kind is GrammarKind.REGEX:
            re.compile(grammar.source)
        if grammar.kind is GrammarKind.EBNF and not ROOT_RULE.search(grammar.source):
            raise ValueError("no root rule")
    except (ValueError, IndexError, re.error) as error:
        raise GrammarError("task.inline.grammar", "the grammar cannot be read") from error
    return "fake"


def instance(schema: Any, root: Any, name: str = "text", depth: int = 0) -> Any:
    """A small instance of a simple JSON schema: required properties, one item per list.

    Strings contain the name of their property. Schemas with constraints between parts of the value
    are not supported; the instance is then invalid.
    """
    if not isinstance(schema, Mapping) or depth > DEPTH_LIMIT:
        return name
    if "$ref" in schema:
        return instance(resolved(schema["$ref"], root), root, name, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return instance(schema[key][0], root, name, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        properties = schema.get("properties", {})
        required = schema.get("required", ())
        return {key: instance(properties.get(key, True), root, key, depth + 1) for key in required}
    if kind == "array":
        least = schema.get("minItems", min(1, schema.get("maxItems", 1)))
        prefix = schema.get("prefixItems", [])[:least]
        items = [*prefix, *[schema.get("items", True)] * (least - len(prefix))]
        return [instance(item, root, name, depth + 1) for item in items]
    return scalar(kind, schema, name)


def scalar(kind: str, schema: Mapping[str, Any], name: str) -> Any:
    """A value for a type other than object and array."""
    if kind in ("integer", "number"):
        least: float = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        return min(least, schema.get("maximum", least))
    if kind == "boolean":
        return True
    if kind == "null":
        return None
    return name.ljust(schema.get("minLength", 0), "x")[: schema.get("maxLength")]


def resolved(reference: str, root: Any) -> Any:
    """The subschema at a local reference such as ``#/$defs/point``."""
    found = root
    for part in reference.lstrip("#/").split("/"):
        found = found[part.replace("~1", "/").replace("~0", "~")] if part else found
    return found


class FakeSettings(EngineSettings):
    """Settings of the fake engine."""


def build(
    model: str | Path,
    settings: FakeSettings,
    *,
    revision: str | None,
    max_images: int,
    on_progress: Callable[[str], None] | None,
) -> FakeEngine:
    """Build the engine for the registry. Only ``vision`` has an effect, as there is no model."""
    return FakeEngine(vision=settings.vision)


KIND = EngineKind("fake", FakeSettings, build, offered=False)
