"""Hooks of Schemathesis for the HTTP API; `SCHEMATHESIS_HOOKS` names this module.

Random requests that fit the document hardly ever name a model that is served, hold an image that can be
decoded, or end with a message of the user. Most are repaired, so that they reach the model.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from typing import Any

import schemathesis
from jsonschema import Draft202012Validator

from tests.service.harness import image_bytes

MODEL = os.environ.get("FUZZED_MODEL", "drawings")
IMAGE = "data:image/png;base64," + base64.b64encode(image_bytes(32, 24, "PNG")).decode()
BY_CALLERS = ("OUTPUT_INVALID", "NO_USABLE_FIELDS")
"""Errors of the server itself, with a status of 5xx, that a request can bring about."""


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Name the served model; repair three of four requests."""
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        return body
    chosen = zlib.crc32(json.dumps(body, sort_keys=True, default=str).encode())
    repaired = {**body, "model": MODEL}
    if chosen % 4:
        key = "messages" if "messages" in body else "input"
        repaired = with_images(repaired)
        repaired[key] = conversation(body.get(key))
        repaired = with_tools(repaired, key, chosen)
    return repaired


def conversation(messages: Any) -> Any:
    """Without results of tools that nobody called, one system message at most, and the user's last."""
    if not isinstance(messages, list):
        return messages
    kept = [
        with_images(one)
        for place, one in enumerate(messages)
        if isinstance(one, dict)
        and one.get("role") in ("user", *(() if place else ("system", "developer")))
    ]
    return [*kept, {"role": "user", "content": "Is it day or night?"}]


def with_images(value: Any) -> Any:
    """A value with a real image in place of each other address."""
    if isinstance(value, list):
        return [with_images(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {name: with_images(one) for name, one in value.items()}
    for name in ("url", "image_url"):
        if isinstance(found.get(name), str):
            found[name] = IMAGE
    return found


def with_tools(body: dict[str, Any], key: str, chosen: int) -> dict[str, Any]:
    """The first tool alone, and forced; no tools in a half of the requests."""
    found = {name: value for name, value in body.items() if name not in ("tool_choice", "task")}
    tools = found.pop("tools", None)
    formats = ("response_format", "structured_outputs", "text", "stop", "n", "stream_options")
    if chosen % 2 and isinstance(tools, list) and tools:
        found = {name: value for name, value in found.items() if name not in formats}
        found |= {"tools": tools[:1], "tool_choice": "required"}
    elif chosen % 8 == 2:
        found = {name: value for name, value in found.items() if name not in formats[1:]}
    limit = "max_tokens" if key == "messages" else "max_output_tokens"
    found.pop("max_completion_tokens", None)
    return {**found, limit: 16 + chosen % 48}


@schemathesis.check
def no_defect(context: Any, response: Any, case: Any) -> None:
    """The server blames itself only where its documentation says so."""
    if response.status_code >= 500:
        code = response.json()["error"]["code"]
        assert code in BY_CALLERS, f"{response.status_code} {code}"


@schemathesis.check
def events_fit_the_document(context: Any, response: Any, case: Any) -> None:
    """Each event of a stream has the form that the document names, and a stream ends as it says."""
    if not response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        return
    document = case.operation.schema.raw_schema
    content = document["paths"][case.operation.path]["post"]["responses"]["200"]["content"]
    schema = content["text/event-stream"]["schema"]["properties"]["data"]["contentSchema"]
    validator = Draft202012Validator({**schema, "components": document["components"]})
    found = [
        line.removeprefix("data: ")
        for line in response.content.decode().splitlines()
        if line.startswith("data: ")
    ]
    if "chat" in case.operation.path:
        assert found.pop() == "[DONE]"
    assert found
    for data in found:
        validator.validate(json.loads(data))
