"""A back end with OpenAI's API."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any

from service.engines.remote import chat, ollama
from service.engines.remote.answers import Reader, invalid
from service.engines.remote.backend import BackEnd
from service.engines.remote.discovery import Discoveries, DiscoveryError
from service.engines.remote.images import EncodedFile, Outgoing
from service.engines.remote.members import (
    CHECK_LIMIT_S,
    Member,
    NotBegun,
    Remembered,
)
from service.engines.remote.ollama import OllamaReader
from service.engines.remote.own_errors import NOT_NOW, cut, error_of, told_over_http
from service.engines.remote.schemas import forms
from service.engines.remote.servers import Protocol
from service.engines.remote.wire import Incoming, Silence, TooLarge, Unreachable, Wire, WireError
from service.errors import (
    BackEndAnswerInvalid,
    BackEndFailed,
    BackEndRefusal,
    ContextTooLong,
    GrammarError,
    OutputTruncated,
    Overloaded,
    ServiceError,
)
from service.types import Chunk, GenerateRequest, Grammar, GrammarKind, Usage

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
WHOLE, STREAM = "application/json", "text/event-stream"
INLINE_BYTES = 1 << 20
"""Size of images up to which a body is put together on the event loop."""
MAX_AFTER_S = 3600.0
BUSY_AFTER_S = 1.0
"""When to come again to a busy server that does not say when."""
ERROR_BYTES = 4096
"""Bytes of a refusal that are read and logged."""
OWN_ERROR_BYTES = 64 * 1024
"""Maximum size of an error of a server of this project, in bytes."""
_CONTEXT = re.compile(
    r"context_length_exceeded|exceed_context_size|context (length|size|window)|maximum model length"
    r"|max_model_len|prompt is too long|input is too long",
    re.IGNORECASE,
)
"""What servers write when a prompt does not fit."""

log = logging.getLogger(__name__)


class HttpMember(Member):
    """See `service.engines.remote.members.Member`.

    model: name on the server; None takes the only one that the server lists. stream: see the
    settings. probe: try out what the server does not tell of itself.
    """

    def __init__(
        self,
        name: str,
        wire: Wire,
        model: str | None,
        kind: str,
        *,
        stream: bool,
        silence_s: float,
        limit: int,
        probe: bool = False,
    ) -> None:
        assumed = BackEnd(wire.base, _kind(kind), model or "")
        super().__init__(name, assumed, silence_s=silence_s, limit=limit)
        self._wire = wire
        self._model = model
        self._kind = kind
        self._stream = stream
        self._probe = probe
        self._discoveries = Discoveries()
        self._answers_as = ""
        self._models: list[str] = []
        self._forms: Remembered[int] = Remembered()
        """Which form of a schema the server takes."""

    async def prepare(self, grammar: Grammar) -> None:
        """OpenAI's API has no way to ask for this."""

    async def close(self) -> None:
        await self._wire.close()

    # What the server is

    async def _look(self) -> None:
        if self.description is None or self._undescribed():
            await self._describe()
        else:
            await self._ask_health(self.description)

    async def _describe(self) -> None:
        """Look what the server is. The model must not be another one than before."""
        listed = await self._listed()
        before = None if self.description is None else self.description.model
        model = self._model or before
        if model is None and len(listed) > 1:
            raise NotBegun(_other_models(None, listed), permanent=True)
        if model is not None and listed and model not in listed:
            raise NotBegun(_other_models(model, listed), permanent=True)
        kind = None if self._kind == "auto" else self._kind
        try:
            found = await self._discoveries.describe(
                self._wire, kind=kind, model=model, probe=self._probe
            )
        except WireError as error:
            raise self._not_reached(error) from None
        except DiscoveryError as error:
            log.warning("back end %s: %s", self.name, error)
            raise NotBegun(_no_api(), permanent=True) from None
        if listed != self._models:  # then answers may have another name, too
            self._answers_as, self._models = found.back_end.answers_as, listed
        self._stale = False
        self.description = found.back_end

    async def _listed(self) -> list[str]:
        value = await self._get(MODELS)
        data = value.get("data") if isinstance(value, dict) else None
        if not isinstance(data, list):
            raise NotBegun(_no_api(), permanent=True)
        return [str(one["id"]) for one in data if isinstance(one, dict) and one.get("id")]

    async def _get(self, path: str) -> Any:
        try:
            reply = await self._wire.fetch("GET", path, limit_s=CHECK_LIMIT_S)
        except WireError as error:
            raise self._not_reached(error) from None
        if reply.status != 200:
            raise self._not_begun(reply.status, reply.headers, reply.body[:ERROR_BYTES])
        try:
            return reply.json()
        except (ValueError, RecursionError):
            raise NotBegun(_no_api(), permanent=True) from None

    async def _ask_health(self, back_end: BackEnd) -> None:
        path = back_end.server.health or MODELS
        try:
            reply = await self._wire.fetch("GET", path, limit_s=CHECK_LIMIT_S)
        except WireError as error:
            raise self._not_reached(error) from None
        if reply.status == 404 and path != MODELS:
            await self._listed()
        elif reply.status not in (200, 429):  # a busy server works
            raise self._not_begun(reply.status, reply.headers, reply.body[:ERROR_BYTES])

    # Answers

    async def _begin(
        self, request: GenerateRequest, images: Outgoing, back_end: BackEnd
    ) -> AsyncGenerator[Chunk, None]:
        return self._answer(request, await images.encoded(), back_end)

    async def _answer(
        self, request: GenerateRequest, images: Sequence[EncodedFile], back_end: BackEnd
    ) -> AsyncGenerator[Chunk, None]:
        """The answer, asked for in the strongest form that the server takes."""
        limit = True
        stream = self._stream and (request.piecewise or not back_end.server.wholes)
        # A whole answer that replaces a stream may take until the deadline.
        silence_s = self._silence_s if stream or not self._stream else None
        waiting = self._grammars(request.grammar, back_end)
        number, grammar = next(waiting)
        while True:
            plan = chat.Plan(grammar, stream, limit)
            body = await _encoded(request, images, back_end, plan)
            try:
                async with aclosing(self._exchange(body, back_end, stream, silence_s)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except _Refused as refused:
                if refused.of_context and limit and request.sampling.max_tokens is None:
                    limit = False  # the server then takes what is left of the context
                elif not refused.of_context and (simpler := next(waiting, None)) is not None:
                    number, grammar = simpler
                else:
                    raise refused.error_for(request) from None
            else:
                self._remember(request.grammar, number)
                return

    def _grammars(
        self, grammar: Grammar | None, back_end: BackEnd
    ) -> Iterator[tuple[int, Grammar | None]]:
        """The grammar in the forms that the server may take, the strongest first; without those
        that it refused before. Simpler forms are made only where one is needed."""
        if grammar is None or grammar.kind is not GrammarKind.JSON_SCHEMA:
            yield 0, grammar
            return
        known = self._forms.get(grammar) or 0
        for number, source in enumerate(forms(grammar.source, back_end.server.keywords)):
            if number >= known:
                same = source == grammar.source
                yield number, grammar if same else replace(grammar, source=source)

    def _remember(self, grammar: Grammar | None, number: int) -> None:
        """Do not ask again in a form that was refused."""
        if grammar is None or number == 0:
            return
        if self._forms.get(grammar) != number:
            log.info("back end %s takes a simpler form of a schema", self.name)
        self._forms.keep(grammar, number)

    async def _exchange(
        self, body: bytes, back_end: BackEnd, stream: bool, silence_s: float | None
    ) -> AsyncGenerator[Chunk, None]:
        """One request and its answer. Raises ``_Refused`` and ``NotBegun`` before the first
        chunk."""
        native = back_end.server.protocol is Protocol.OLLAMA
        own = back_end.server.own
        reader = (OllamaReader if native else Reader)(self._answers_as, not native, own)
        path = ollama.PATH if native else CHAT
        exchange = self._wire.request(
            "POST",
            path,
            body,
            silence_s=silence_s,
            keep=not (stream and back_end.server.closes_streams),
        )
        text = ""
        try:
            async with exchange as incoming:
                if incoming.status != 200:
                    raise await self._refusal(incoming, back_end)
                if not native and _is_whole(incoming):
                    text = await reader.whole(incoming)
                else:
                    async for piece in reader.streamed(incoming):
                        yield Chunk(piece.text, usage=Usage(0, 0, piece.tokens))
        except Unreachable as error:
            self._lost(error)
            raise self._not_reached(error) from None
        except WireError as error:
            raise self._broken(error) from None
        except OutputTruncated as error:  # of a server of this project
            yield cut(error.metadata)
            return
        except BackEndAnswerInvalid as error:
            if error.metadata.get("fault") == "model":
                self.healthy, self._stale = False, True
            log.warning("back end %s: %s", self.name, error.message)
            raise
        self._answers_as = self._answers_as or reader.model
        usage = reader.usage or Usage(0, 0, reader.deltas)
        # A whole answer is one chunk: nobody could end it early, and the last chunk is validated.
        yield Chunk(text, reader.finish_reason, usage)

    async def _refusal(self, incoming: Incoming, back_end: BackEnd) -> Exception:
        """The error for another status than 200."""
        own = back_end.server.own
        limit = OWN_ERROR_BYTES if own else ERROR_BYTES
        body = b""
        async for piece in incoming.pieces():
            body += piece
            if len(body) >= limit:
                break
        log.warning("back end %s answers %d: %.500r", self.name, incoming.status, body)
        if own:
            error = _own_error(incoming.status, incoming.headers, body)
            if error is not None:
                return error
        body = body[:ERROR_BYTES]
        if incoming.status in back_end.server.schema_errors:
            return _Refused(incoming.status, body.decode("utf-8", "replace"))
        if incoming.status in (429, 503):
            return self._not_begun(incoming.status, incoming.headers, body)
        return _failed(incoming.status)

    def _not_begun(self, status: int, headers: dict[str, str], body: bytes) -> NotBegun:
        after_s = retry_after_s(headers.get("retry-after"))
        if status == 429:
            error: ServiceError = Overloaded(
                "The model server is busy; try again later.",
                retry_after_s=BUSY_AFTER_S if after_s is None else after_s,
            )
            return NotBegun(error, after_s=after_s)
        if status == 503:
            return NotBegun.not_now(after_s)
        return NotBegun(_failed(status), permanent=400 <= status < 500)

    def _not_reached(self, error: WireError) -> NotBegun:
        log.debug("back end %s: %s", self.name, error)
        permanent = isinstance(error, Unreachable) and error.permanent
        return NotBegun.unreached(permanent=permanent)

    def _broken(self, error: WireError) -> ServiceError:
        log.warning("back end %s: %s", self.name, error)
        if isinstance(error, Silence):
            return self._stalled()
        if isinstance(error, TooLarge):
            return invalid("too_large", "is larger than any complete answer")
        return self._broken_off()


def _own_error(status: int, headers: Mapping[str, str], body: bytes) -> Exception | None:
    """The error of a server of this project; None where the body is none of its own."""
    after_s = retry_after_s(headers.get("retry-after"))
    told = told_over_http(status, body, after_s if status == 429 else None)
    if told is None:
        return None
    error = error_of(told)
    if isinstance(error, Overloaded) or told.reason in NOT_NOW:
        return NotBegun(error, after_s=after_s)
    return error


def _kind(setting: str) -> str:
    """The kind of a server, by the setting alone."""
    return "unknown" if setting == "auto" else setting


def _is_whole(incoming: Incoming) -> bool:
    """Whether an answer is one object, not a stream. Servers may ignore that a stream is wanted."""
    content_type = incoming.headers.get("content-type", STREAM).partition(";")[0].strip().lower()
    if content_type not in (WHOLE, STREAM):
        raise invalid("not_json", f"is neither {WHOLE} nor {STREAM}")
    return content_type == WHOLE


class _Refused(Exception):
    """The server refused a request before it generated anything. text: its answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self._status = status
        self.of_context = _CONTEXT.search(text) is not None

    def error_for(self, request: GenerateRequest) -> ServiceError:
        """The error for the caller, when no other plan is left."""
        if self.of_context:
            return ContextTooLong(
                "task",
                "the prompt, with the tokens of the answer, does not fit into the context of the "
                "model server; shorten the text, send fewer or smaller images, or lower max_tokens",
            )
        if self._status >= 500:
            return _failed(self._status)
        if request.grammar is not None and not request.all_images:
            return GrammarError(
                request.grammar.kind.value,
                "is refused by the model server, which may not take such a grammar; the operator "
                "finds its answer in the log",
                reason="BACKEND_REFUSED",
            )
        return BackEndRefusal(
            "The model server refuses the request; the operator finds its answer in the log.",
            metadata={"status": str(self._status)},
        )


async def _encoded(
    request: GenerateRequest, images: Sequence[EncodedFile], back_end: BackEnd, plan: chat.Plan
) -> bytes:
    native = back_end.server.protocol is Protocol.OLLAMA
    encode = ollama.encode if native else chat.encode
    if sum(len(one.base64) for one in images) <= INLINE_BYTES:
        return encode(request, images, back_end, plan)
    return await asyncio.to_thread(encode, request, images, back_end, plan)


def retry_after_s(value: str | None) -> float | None:
    """Seconds of a header Retry-After, given as a number or as a date; None without one."""
    if value is None:
        return None
    try:
        found = float(value)
    except ValueError:
        try:
            found = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(found, 0.0), MAX_AFTER_S) if found == found else None  # NaN


def _failed(status: int) -> BackEndFailed:
    if status in (401, 403):
        why = "refuses the API key of this server"
    elif status == 404:
        why = "does not serve the model, or not under this URL"
    elif 300 <= status < 400:
        why = "redirects, which is not followed"
    else:
        why = "failed"
    return BackEndFailed(
        f"The model server {why} (HTTP status {status}). The operator has to look at it.",
        metadata={"status": str(status)},
    )


def _no_api() -> BackEndFailed:
    return BackEndFailed(
        "The model server does not list its models under /v1/models; the URL may be wrong.",
        metadata={"status": "200"},
    )


def _other_models(model: str | None, listed: Sequence[str]) -> BackEndFailed:
    names = ", ".join(listed[:20]) or "none"
    if model is None:
        text = f"The model server serves several models: {names}. Name one (remote_model)."
    else:
        text = f"The model server does not serve the model that is asked for. It serves: {names}."
    return BackEndFailed(text, metadata={"status": "200"})
