"""Requests to every endpoint of `lmdeploy serve api_server`, with and without images."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any

from tests.host_runtime.server import Server
from tests.lmdeploy_ext.vision_off.samples import DATA, PARTS, PIXEL

MODEL = "tiny"
Request = tuple[str, dict[str, Any]]
"""Path and body."""

KEY = "key-of-the-tests"
HEADERS = {
    "Content-Type": "application/json",
    "anthropic-version": "2023-06-01",
    "Authorization": f"Bearer {KEY}",
}


def post(server: Server, request: Request, headers: dict[str, str] = HEADERS) -> tuple[int, str]:
    """Make a request; returns status and body."""
    path, body = request
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    try:
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


TEXT = {"type": "text", "text": "describe the picture"}


def chat(*content: Any, role: str = "user", **fields: Any) -> Request:
    question = {"role": "user", "content": "hi"}
    messages = [question, {"role": role, "content": [TEXT, *content]}, question]
    return "/v1/chat/completions", {"model": MODEL, "messages": messages, **fields}


def completions(*content: Any, **fields: Any) -> Request:
    prompt = [[{"role": "user", "content": [TEXT, *content]}]]
    return "/v1/completions", {"model": MODEL, "prompt": prompt, **fields}


def responses(*content: Any, **fields: Any) -> Request:
    content = ({"type": "input_text", "text": "hi"}, *content)
    return "/v1/responses", {
        "model": MODEL, "input": [{"role": "user", "content": list(content)}], **fields
    }  # fmt: skip


def messages(*content: Any, role: str = "user", **fields: Any) -> Request:
    turns = [{"role": "user", "content": "hi"}, {"role": role, "content": [TEXT, *content]}]
    return "/v1/messages", {"model": MODEL, "max_tokens": 8, "messages": turns, **fields}


def count_tokens(*content: Any, **fields: Any) -> Request:
    turns = [{"role": "user", "content": [TEXT, *content]}]
    return "/v1/messages/count_tokens", {"model": MODEL, "messages": turns, **fields}


ENDPOINTS: dict[str, Callable[..., Request]] = {
    "chat": chat, "completions": completions, "responses": responses, "messages": messages,
    "count_tokens": count_tokens,
}  # fmt: skip
STREAMING = ("chat", "completions", "responses", "messages")


def every_part() -> Iterator[tuple[str, Request]]:
    """Every part at every endpoint, streamed and not."""
    for name, make in ENDPOINTS.items():
        for kind, part in PARTS.items():
            yield f"{name}, {kind}", make(part)
            if name in STREAMING:
                yield f"{name}, {kind}, stream", make(part, stream=True)


def every_place() -> Iterator[tuple[str, Request]]:
    """Images in other places than a user's content."""
    image, anthropic = PARTS["image_url"], PARTS["Anthropic image"]
    for role in ("system", "assistant", "tool"):
        yield f"chat, {role}", chat(image, role=role)
        yield f"chat, {role}, alias", chat(PARTS["input_image"], role=role, stream=True)
    result = {"type": "tool_result", "tool_use_id": "t", "content": [anthropic]}
    for role in ("user", "assistant"):
        yield f"messages, tool result of {role}", messages(result, role=role)
    yield "messages, assistant", messages(anthropic, role="assistant")
    yield "messages, system turn", messages(anthropic, role="system")
    yield "messages, system", messages(system=[TEXT, anthropic])
    yield (
        "messages, document in a tool result",
        messages({**result, "content": [PARTS["Anthropic document"]]}),
    )
    yield "count_tokens, system", count_tokens(system=[anthropic])
    yield "count_tokens, tool result", count_tokens(result)
    output = {"type": "function_call_output", "call_id": "c", "output": [PARTS["input_image"]]}
    shot = {
        "type": "computer_call_output",
        "call_id": "c",
        "output": {"type": "computer_screenshot"},
    }
    for name, item in (("function", output), ("computer", shot)):
        yield f"responses, {name} output", ("/v1/responses", {"model": MODEL, "input": [item]})
    content = {"role": "user", "content": image}
    yield (
        "chat, content is a part",
        ("/v1/chat/completions", {"model": MODEL, "messages": [content]}),
    )
    images = {"role": "user", "content": "hi", "images": [DATA]}
    yield (
        "chat, field of a message",
        ("/v1/chat/completions", {"model": MODEL, "messages": [images]}),
    )
    yield "chat, several choices", chat(image, n=2)
    for name, path in (("chat", "/v1/chat/completions"), ("messages", "/v1/messages")):
        body = {
            "model": MODEL,
            "max_tokens": 8,
            "messages": [],
            "input_ids": [1, 2],
            "image_data": PIXEL,
        }
        yield f"{name}, image_data", (path, body)
    for name, image_data in (("text", PIXEL), ("object", {"url": PIXEL}), ("list", [PIXEL])):
        yield f"generate, {name}", ("/generate", {"prompt": "hi", "image_data": image_data})
        yield (
            f"generate, {name}, stream",
            (
                "/generate",
                {"input_ids": [1], "image_data": image_data, "stream": True},
            ),
        )
    yield (
        "generate, field that LMDeploy ignores",
        ("/generate", {"prompt": "hi", "video_data": [PIXEL]}),
    )


def text_only() -> Iterator[tuple[str, Request]]:
    """Text at every endpoint, streamed and not."""
    for name, make in ENDPOINTS.items():
        yield name, make()
        if name in STREAMING:
            yield f"{name}, stream", make(stream=True)
    yield "generate", ("/generate", {"prompt": "hi"})
    yield "generate, stream", ("/generate", {"input_ids": [1, 2], "stream": True})
    yield "generate, empty image_data", ("/generate", {"prompt": "hi", "image_data": []})
    yield "chat, several choices", chat(n=2)
    yield "chat, tool", chat(role="tool")
