"""mistral.rs over HTTP: ``mistral_rs.py CHECKPOINT PORT``. Runs in an environment with ``mistralrs`` alone.

PyPI has the engine of mistral.rs and not its server, so this is a server around the real engine. It reads
and writes the fields of mistralrs-server-core: what that drops is dropped here, what it refuses is refused
with the same status.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RAYON_NUM_THREADS", "1")

import mistralrs  # type: ignore[import-not-found]

checkpoint, port = sys.argv[1], int(sys.argv[2])
runner = mistralrs.Runner(
    which=mistralrs.Which.MultimodalPlain(
        model_id=checkpoint,
        arch=mistralrs.MultimodalArchitecture.Qwen3VL,
        dtype=mistralrs.ModelDType.F32,
    ),
    no_paged_attn=True,
    prefix_cache_n=0,
    token_source="none",
)
starting = threading.Lock()
NAME = "drawings"
CREATED = int(time.time())
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class Unprocessable(Exception):
    """A body that serde cannot read: 422."""


def constraint(body: dict[str, Any]) -> dict[str, str]:
    """Grammar and response_format as mistralrs-server-core reads them."""
    grammar, response_format = body.get("grammar"), body.get("response_format")
    if grammar is not None and response_format is not None:
        raise ValueError(
            "Request `grammar` and `response_format` were both provided but are mutually exclusive."
        )
    if grammar is not None:
        kind, value = grammar.get("type"), grammar.get("value")
        if kind not in ("regex", "json_schema", "lark"):
            raise Unprocessable(f"grammar.type: unknown variant `{kind}`")
        return {
            "grammar_type": kind,
            "grammar": value if isinstance(value, str) else json.dumps(value),
        }
    if response_format is None or response_format.get("type") == "text":
        return {}
    if response_format.get("type") == "json_object":
        return {"grammar_type": "json_schema", "grammar": '{"type":"object"}'}
    if response_format.get("type") != "json_schema":
        raise Unprocessable(f"response_format: unknown variant `{response_format.get('type')}`")
    return {
        "grammar_type": "json_schema",
        "grammar": json.dumps(response_format["json_schema"]["schema"]),
    }


def request_of(body: dict[str, Any]) -> Any:
    given = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    if "max_tokens" in body and "max_completion_tokens" in body:
        raise Unprocessable("duplicate field `max_tokens`")
    limit = body.get("max_tokens", body.get("max_completion_tokens"))
    return mistralrs.ChatCompletionRequest(
        messages=body["messages"],
        model="default",
        max_tokens=limit,
        stream=True,
        enable_thinking=body.get("enable_thinking"),
        **given,
        **constraint(body),
    )


def usage_of(usage: Any) -> dict[str, int]:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {name: getattr(usage, name) for name in names}


def completion(chunks: Iterator[Any]) -> dict[str, Any]:
    """A whole answer from the chunks of a stream: calls for whole answers exclude each other in the
    package, and those for streams do not."""
    text, usage, last = "", None, None
    for last in chunks:
        text += last.choices[0].delta.content or ""
        usage = getattr(last, "usage", None) or usage
    choice = {
        "finish_reason": last.choices[0].finish_reason,
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": None,
    }
    return {
        "id": last.id,
        "choices": [choice],
        "created": last.created,
        "model": NAME,
        "system_fingerprint": last.system_fingerprint,
        "object": "chat.completion",
        "usage": usage_of(usage),
    }


def started(request: Any) -> Iterator[Any]:
    """The chunks of a request; the package lets one thread at a time start one."""
    with starting:
        return iter(runner.send_chat_completion_request(request))


def chunk_of(found: Any) -> dict[str, Any]:
    choices = [
        {
            "finish_reason": one.finish_reason,
            "index": one.index,
            "delta": {"role": one.delta.role, "content": one.delta.content},
            "logprobs": None,
        }
        for one in found.choices
    ]
    chunk = {
        "id": found.id, "choices": choices, "created": found.created, "model": NAME,
        "system_fingerprint": found.system_fingerprint, "object": "chat.completion.chunk",
    }  # fmt: skip
    usage = getattr(found, "usage", None)
    return chunk if usage is None else {**chunk, "usage": usage_of(usage)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        """No access log."""

    def do_GET(self) -> None:
        entry = {"object": "model", "created": CREATED, "owned_by": "local"}
        version = importlib.metadata.version("mistralrs")
        pages: dict[str, Any] = {
            "/": "OK",
            "/health": "OK",
            "/v1/models": {"object": "list", "data": [
                {**entry, "id": "default", "root": "default"},
                {**entry, "id": NAME, "root": NAME, "status": "loaded"},
            ]},
            "/v1/system/info": {"os": "Linux", "build": {"version": version, "git_revision": "PyPI"}},
        }  # fmt: skip
        if self.path in pages:
            self._send(200, pages[self.path])
        else:
            self._send(404, "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/chat/completions":
            return self._send(404, "")
        try:
            request = request_of(body)
            if body.get("stream"):
                return self._stream(request)
            found = completion(started(request))
        except Unprocessable as error:
            return self._send(
                422, f"Failed to deserialize the JSON body into the target type: {error}"
            )
        except Exception as error:
            return self._send(500, {"message": str(error)})
        return self._send(200, found)

    def _stream(self, request: Any) -> None:
        chunks = started(request)
        first = next(chunks)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        self._event(json.dumps(chunk_of(first)))
        for chunk in chunks:
            self._event(json.dumps(chunk_of(chunk)))
        self._event("[DONE]")

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _send(self, status: int, content: Any) -> None:
        plain = isinstance(content, str)
        data = content.encode() if plain else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "text/plain" if plain else "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


server = Server(("127.0.0.1", port), Handler)
print("listening", f"http://127.0.0.1:{server.server_address[1]}", flush=True)
server.serve_forever()
