"""The routes of the HTTP API, and their handlers: decode, call, encode."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response as RawResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.deadlines import Deadline
from service.errors import InvalidRequest, ServiceError
from service.http_api.answers import Completion, dumps
from service.http_api.chat_codec import decode_chat
from service.http_api.codec import Asked
from service.http_api.document import openapi_document
from service.http_api.errors import body_of, headers_of
from service.http_api.exchange import JSON, Endpoint, Exchange
from service.http_api.payloads import Payloads
from service.http_api.reading import BODY
from service.http_api.responses_answers import Response
from service.http_api.responses_codec import decode_responses
from service.inference.ahead import ahead
from service.inference.calls import Answer
from service.inference.pipeline import Inference
from service.lifecycle import Phase
from service.logs import request_id
from service.observation import LOG_OUTPUT_KEY
from service.quotas import Caller
from service.request_ids import REQUEST_ID_KEY, TRACE_KEY, chosen_id
from service.runtime import Runtime
from service.settings import Settings
from service.types import Capabilities

if TYPE_CHECKING:  # needs a client for HTTP, which most servers have no use for
    from service.http_api.fetching import ImageFetcher

INLINE_BYTES = 1024 * 1024
"""Size up to which a body is decoded on the event loop if it is small without its images: a thread
would cost more."""
INLINE_LEAN_BYTES = 32 * 1024
"""The size without images, which is what is read as JSON."""
ROUTE_ERRORS = {404: "UNKNOWN_PATH", 405: "METHOD_NOT_ALLOWED"}
CORS_HEADERS = (
    *("authorization", "content-type", "x-api-key"),
    *(REQUEST_ID_KEY, LOG_OUTPUT_KEY, "traceparent", "tracestate"),
    # Of Connect and gRPC-Web, which share the port.
    *(
        "connect-protocol-version",
        "connect-timeout-ms",
        "x-grpc-web",
        "x-user-agent",
        "grpc-timeout",
    ),
)


class Generation:
    """POST of a request for an answer.

    decode: the body -> the call. form: the request id and the call -> the form of its answer. fetcher:
    fetches images by URL; None where the server does not.
    """

    def __init__(
        self,
        runtime: Runtime,
        decode: Callable[[Payloads, Settings, Caller], Asked],
        form: type[Completion] | type[Response],
        fetcher: ImageFetcher | None,
    ) -> None:
        self._runtime = runtime
        self._decode = decode
        self._form = form
        self._fetcher = fetcher

    async def __call__(self, exchange: Exchange) -> None:
        asked = await self._decoded(await exchange.body(), exchange.caller)
        exchange.fields = asked.fields
        inference = self._runtime.inference_for(asked.model)
        form = self._form(exchange.request_id, asked)
        if not asked.stream:
            answer = await exchange.while_connected(self._answer(asked, inference))
            await exchange.send(form.whole(answer), JSON)
            return
        events = ahead(self._events(asked, inference))
        await exchange.stream(form.events(events, whole=self._tidied(asked.call.task)), form)

    async def _answer(self, asked: Asked, inference: Inference) -> Answer:
        return await inference.answer(asked.call, await self._fetched(asked))

    def _events(self, asked: Asked, inference: Inference) -> AsyncGenerator[str | Answer, None]:
        if not asked.remote:
            return inference.events(asked.call, None)

        async def events() -> AsyncGenerator[str | Answer, None]:
            left_s = await self._fetched(asked)
            async with aclosing(inference.events(asked.call, left_s)) as opened:
                async for event in opened:
                    yield event

        return events()

    async def _fetched(self, asked: Asked) -> float | None:
        """Fetch the images that have no bytes yet. The time that is left for the call, in seconds;
        None: all of it."""
        if not asked.remote:
            return None
        assert self._fetcher is not None
        deadline = Deadline(self._runtime.settings.inference_timeout_s)
        own_bytes = sum(len(image.data) for image in asked.call.images)
        await self._fetcher.fill(asked.remote, own_bytes, deadline, asked.call.caller)
        return deadline.left_s

    async def _decoded(self, body: bytes, caller: Caller) -> Asked:
        """The body is not kept: the call has the images, and one copy of them waits."""
        settings = self._runtime.settings
        if len(body) > INLINE_BYTES:
            return await asyncio.to_thread(self._in_thread, body, caller)
        payloads = Payloads(body)
        if len(payloads.lean) > INLINE_LEAN_BYTES:
            return await asyncio.to_thread(self._decode, payloads, settings, caller)
        return self._decode(payloads, settings, caller)

    def _in_thread(self, body: bytes, caller: Caller) -> Asked:
        return self._decode(Payloads(body), self._runtime.settings, caller)

    def _tidied(self, task: object) -> bool:
        """Whether the text of an answer is not what the model wrote."""
        return isinstance(task, str) and self._runtime.registry.get(task).document is not None


class Models:
    """GET /v1/models and /v1/models/NAME."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._created = int(time.time())

    async def list(self, exchange: Exchange) -> None:
        found = [self._described(name) for name in self._runtime.models]
        await exchange.answer({"object": "list", "data": found})

    async def one(self, exchange: Exchange) -> None:
        name = exchange.scope["path_params"]["model"]
        self._runtime.inference_for(name)
        await exchange.answer(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        return describe_model(self._runtime.models[name].capabilities, self._created)


def describe_model(capabilities: Capabilities, created: int) -> dict[str, Any]:
    """Capabilities -> model of OpenAI, with the length of the context, what a prompt is made of, and
    whether it has the schema of the answer."""
    return {
        "id": capabilities.model,
        "object": "model",
        "created": created,
        "owned_by": "qwen3vl",
        "max_model_len": capabilities.context_length,
        "input_modalities": sorted((one.value for one in capabilities.modalities), reverse=True),
        "schema_in_prompt": capabilities.schema_in_prompt,
    }


class Health:
    """GET /livez, /readyz and /healthz."""

    def __init__(self, runtime: Runtime) -> None:
        self._lifecycle = runtime.lifecycle

    async def live(self, exchange: Exchange) -> None:
        """The process answers."""
        await exchange.answer({"status": "live"})

    async def ready(self, exchange: Exchange) -> None:
        """The server takes calls: 200, else 503."""
        phase = self._lifecycle.phase
        await exchange.answer({"status": phase.value}, 200 if phase is Phase.SERVING else 503)


def build_app(
    runtime: Runtime, routes: Sequence[BaseRoute] = (), fetcher: ImageFetcher | None = None
) -> ASGIApp:
    """The whole application. routes: further ones, which are tried first. fetcher: of images."""
    chat = Generation(runtime, decode_chat, Completion, fetcher)
    responses = Generation(runtime, decode_responses, Response, fetcher)
    models, health = Models(runtime), Health(runtime)
    document = dumps(openapi_document())

    async def show_document(exchange: Exchange) -> None:
        await exchange.send(document, JSON)

    found = [
        *routes,
        _route(runtime, "/v1/chat/completions", "chat.completions", chat, "POST"),
        _route(runtime, "/v1/responses", "responses", responses, "POST"),
        _route(runtime, "/v1/models", "models", models.list),
        _route(runtime, "/v1/models/{model:path}", "models", models.one),
        _route(runtime, "/openapi.json", "openapi", show_document, public=True),
        _route(runtime, "/livez", "health", health.live, public=True),
        _route(runtime, "/readyz", "health", health.ready, public=True),
        _route(runtime, "/healthz", "health", health.ready, public=True),
    ]
    origins = runtime.settings.allowed_origins
    cors = Middleware(
        Cors,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=CORS_HEADERS,
        expose_headers=(
            *(REQUEST_ID_KEY, TRACE_KEY, "retry-after", "x-error-reason"),
            *("grpc-status", "grpc-message", "grpc-status-details-bin"),
        ),
    )
    app = Starlette(
        routes=found,
        middleware=[cors] if origins else [],
        exception_handlers={HTTPException: _not_served},
    )
    app.router.redirect_slashes = False
    return Identified(app)


def _route(
    runtime: Runtime,
    path: str,
    name: str,
    handler: Any,
    method: str = "GET",
    *,
    public: bool = False,
) -> Route:
    return Route(path, Endpoint(runtime, name, handler, public=public), methods=[method])


class Cors(CORSMiddleware):
    """Answers preflights; one that is refused gets an error of this API."""

    def preflight_response(self, request_headers: Headers) -> RawResponse:
        found = super().preflight_response(request_headers)
        if found.status_code == 200:
            return found
        asked = bytes(found.body).decode().removeprefix("Disallowed CORS ")
        refused = InvalidRequest(
            BODY, f"pages of this origin may not send such a request; not allowed: {asked}"
        )
        headers = {
            name: value
            for name, value in found.headers.items()
            if name not in ("content-length", "content-type")
        }
        return RawResponse(dumps(body_of(refused)), 400, headers, JSON)


class Identified:
    """Gives every request its id, and every answer the header with it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = REQUEST_ID_KEY.encode()
        given = next((value for name, value in scope["headers"] if name == key), b"")
        identity = chosen_id(given.decode("latin-1"))
        request_id.set(identity)

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (key, identity.encode())]
            await send(message)

        names = [name for name, _ in scope["headers"]]
        if b"content-length" in names and b"transfer-encoding" in names:
            await _two_lengths(scope, receive, identified)
            return
        await self._app(scope, receive, identified)


async def _two_lengths(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse a body with two lengths, which a proxy may read in another way, and close the connection."""
    what = "has a content-length and a transfer-encoding; send one of them"
    refused = InvalidRequest(BODY, what, reason="MALFORMED_REQUEST")
    headers = {**dict(headers_of(refused)), "connection": "close"}
    await RawResponse(dumps(body_of(refused)), 400, headers, JSON)(scope, receive, send)


def _meant(path: str) -> str | None:
    """The path of the API that a path stands for whose base URL lacks /v1, or has it twice."""
    served = ("/v1/chat/completions", "/v1/responses", "/v1/models")
    return next((one for one in served if path in (one.removeprefix("/v1"), f"/v1{one}")), None)


async def _not_served(request: Request, error: Exception) -> RawResponse:
    """The answer to a path or method that is not served."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "")
    if error.status_code == 405:
        message = f"This path takes {allowed}, not {request.method[:20]}."
    elif request.url.path.startswith("/v1/responses/"):
        message = "Responses are not stored; the answer to POST /v1/responses is the only one."
    elif (meant := _meant(request.url.path)) is not None:
        message = f"This path is not served; {meant} is. The base URL of SDKs ends with /v1."
    else:
        message = "This path is not served. The document of this API is at /openapi.json."
    refused = ServiceError(message, reason=ROUTE_ERRORS[error.status_code])
    headers = {**dict(headers_of(refused)), **({"allow": allowed} if allowed else {})}
    return RawResponse(dumps(body_of(refused)), error.status_code, headers, JSON)
