"""Checks the request bodies of `lmdeploy serve` before LMDeploy translates them.

LMDeploy's Anthropic API drops images from system and tool messages and converts documents to text
before a conversation reaches the engine; other APIs ignore unknown fields.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from lmdeploy_ext.vision_off.parts import find_in_body

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

ROUTES = frozenset({
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/generate",
})  # fmt: skip
"""POST routes whose body contains a conversation."""


class RefuseMedia:
    """ASGI middleware that answers 400, in the format of the route's API, unless the body is text
    only.

    Args:
        error: creates the error from a description.
    """

    def __init__(self, app: App, error: Callable[[str], Exception]) -> None:
        self.app = app
        self.error = error

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or _route(scope) not in ROUTES:
            await self.app(scope, receive, send)
            return
        messages = await _read(receive)
        found = _find(b"".join(message.get("body", b"") for message in messages))
        if found is not None:
            from lmdeploy.serve.utils.server_utils import protocol_error_response

            response = protocol_error_response(_route(scope), self.error(found))
            await response(scope, receive, send)
            return

        async def replay() -> Message:
            return messages.popleft() if messages else await receive()

        await self.app(scope, replay, send)


def _route(scope: Message) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


async def _read(receive: Receive) -> deque[Message]:
    """The ASGI messages of the body, up to its end or the caller's disconnection."""
    messages: deque[Message] = deque()
    while True:
        messages.append(await receive())
        if messages[-1]["type"] != "http.request" or not messages[-1].get("more_body", False):
            return messages


def _find(body: bytes) -> str | None:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return None  # LMDeploy parses the body the same way and answers 400
    return find_in_body(parsed)
