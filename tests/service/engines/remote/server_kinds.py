"""Scripted model servers: each answers what the real server answers, field by field, from its public
source and documentation, and treats the fields of a request as the real one does.

The models have names that say nothing, or the wrong thing.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web
from PIL import Image

Body = dict[str, Any]
PROMPT_TOKENS, IMAGE_TOKENS = 20, 16
UNSET = object()


@dataclass(frozen=True)
class Script:
    """A server.

    pages: path -> JSON, or the text of a page. headers: of every answer.
    limits: fields that limit the tokens. sampling: options that have an effect.
    schema: the schema in a request, or None; where the server ignores it, None.
    text_grammar: a sample that fits the other grammar of a request, or None.
    formats: types of response_format that are accepted; None accepts everything.
    vision: images are seen; False drops them; None refuses them with 400.
    thoughts: whether the answer to a request stands in the channel for thoughts.
    refusal: status for a format that is not accepted. ollama: has Ollama's own API. usage: tells
    tokens. patterns: keeps to the patterns of a schema. image_tokens: of each image in the prompt.
    key: API key that is asked for.
    """

    pages: Mapping[str, Any]
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[str, ...] = ("max_completion_tokens", "max_tokens")
    sampling: tuple[str, ...] = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    schema: Callable[[Body], Any] = lambda body: _schema_of(body)
    text_grammar: Callable[[Body], str | None] = lambda body: None
    formats: tuple[str, ...] | None = ("text", "json_object", "json_schema")
    vision: bool | None = True
    thoughts: Callable[[Body], bool] = lambda body: False
    refusal: int = 400
    ollama: bool = False
    usage: bool = True
    patterns: bool = True
    image_tokens: int = IMAGE_TOKENS
    key: str | None = None


class Server:
    """A script that runs. requests: bodies of chat completions, in their order. script may be
    replaced while it runs."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Body] = []
        self.headers: list[Mapping[str, str]] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.headers.append(dict(request.headers))
        found = await self._answer(request)
        found.headers.update(self.script.headers)
        return found

    async def _answer(self, request: web.Request) -> web.Response:
        script, path = self.script, request.path
        if script.key and request.headers.get("Authorization") != f"Bearer {script.key}":
            return _error(401, "Unauthorized")
        if request.method == "POST" and path == "/v1/chat/completions":
            return self._chat(await request.json())
        if request.method == "POST" and path == "/api/chat" and script.ollama:
            return self._ollama(await request.json())
        page = script.pages.get(f"{request.method} {path}", script.pages.get(path, UNSET))
        if callable(page):
            page = page(await request.json())
        if page is UNSET:
            return web.json_response({"detail": "Not Found"}, status=404)
        if isinstance(page, str):
            return web.Response(text=page, content_type="text/plain")
        return web.json_response(page)

    def _chat(self, body: Body) -> web.Response:
        script = self.script
        self.requests.append(body)
        kind = (body.get("response_format") or {}).get("type")
        if kind is not None and script.formats is not None and kind not in script.formats:
            return _error(script.refusal, f"response_format.type {kind!r} is not known")
        parts = body["messages"][0]["content"]
        images = (
            [one["image_url"]["url"] for one in parts if one["type"] == "image_url"]
            if isinstance(parts, list)
            else []
        )
        if images and script.vision is None:
            return _error(400, "this model is not a multimodal model")
        text, thoughts, tokens, cut = self._generate(body, body, images)
        message: Body = {"role": "assistant", "content": text}
        if thoughts is not None:
            message["reasoning_content"] = thoughts
        choice = {"index": 0, "message": message, "finish_reason": "length" if cut else "stop"}
        answer = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": body["model"],
            "choices": [choice],
        }
        if script.usage:
            prompt = PROMPT_TOKENS + script.image_tokens * len(images) * bool(script.vision)
            answer["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": tokens,
                "total_tokens": prompt + tokens,
            }
        return web.json_response(answer)

    def _ollama(self, body: Body) -> web.Response:
        self.requests.append(body)
        message = body["messages"][0]
        images = [f"data:,{one}" for one in message.get("images", [])]
        text, thoughts, tokens, cut = self._generate(body, body.get("options", {}), images)
        answer: Body = {"role": "assistant", "content": text or ""}
        if thoughts is not None:
            answer["thinking"] = thoughts
        prompt = PROMPT_TOKENS + IMAGE_TOKENS * len(images) * bool(self.script.vision)
        return web.json_response({
            "model": body["model"], "created_at": "2026-11-01T00:00:00Z", "message": answer, "done": True,
            "done_reason": "length" if cut else "stop", "total_duration": 5, "prompt_eval_count": prompt,
            "eval_count": tokens,
        })  # fmt: skip

    def _generate(
        self, body: Body, options: Body, images: list[str]
    ) -> tuple[str | None, str | None, int, bool]:
        """Text, thoughts, tokens, and whether the text was cut. One word is one token."""
        script = self.script
        text = self._text(body, options, images)
        thoughts = None
        if script.thoughts(body):
            text, thoughts = None, text
        words = (text or thoughts or "").split(" ")
        limits = [options[name] for name in script.limits if name in options]
        cut = bool(limits) and len(words) > min(limits)
        if cut:
            words = words[: min(limits)]
            kept = " ".join(words)
            text, thoughts = (kept, None) if thoughts is None else (None, kept)
        return text, thoughts, len(words), cut

    def _text(self, body: Body, options: Body, images: list[str]) -> str:
        schema = self.script.schema(body)
        seen = _colour(images[0]) if images and self.script.vision else "green"
        if schema is not None:
            return json.dumps(_instance(schema, seen, self.script.patterns))
        found = self.script.text_grammar(body)
        if found is not None:
            return found
        return seen if images else self._prose(options)

    def _prose(self, options: Body) -> str:
        """Greedy decoding, unless an option that has an effect changes it."""
        names = {"repeat_penalty": "repetition_penalty"}
        given = {names.get(name, name): value for name, value in options.items()}
        used = {name: given[name] for name in self.script.sampling if name in given}
        greedy = (
            not used.get("temperature") or used.get("top_k") == 1 or used.get("top_p", 1) < 1e-3
        )
        state = [used.get("repetition_penalty", 1)]
        if not greedy:
            state.append(used.get("seed", len(self.requests)))
        digest = hashlib.sha256(repr(state).encode()).hexdigest()
        return " ".join(digest[begin : begin + 4] for begin in range(0, 40, 4))


def _schema_of(body: Body) -> Any:
    given = body.get("response_format") or {}
    return given["json_schema"]["schema"] if given.get("type") == "json_schema" else None


def _instance(schema: Body, colour: str, patterns: bool) -> Any:
    if "properties" in schema:
        return {
            name: _instance(one, colour, patterns) for name, one in schema["properties"].items()
        }
    if "enum" in schema:
        return colour if colour in schema["enum"] else schema["enum"][0]
    return sample(schema["pattern"].strip("^$")) if patterns else "text"


def sample(expression: str) -> str:
    """A text that fits an expression of letters and digits."""
    return re.sub(r"\[0-9\](\{(\d)\})?", lambda found: "7" * int(found[2] or 1), expression)


def gbnf(source: str) -> str:
    """A text that fits a grammar of one rule."""
    right = source.split("::=")[1].split("|")[0]
    return sample(right.replace('"', "").replace(" ", ""))


def _colour(url: str) -> str:
    image = Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))).convert("RGB")
    red, green, blue = image.getpixel((5, 5))
    return ["red", "green", "blue"][[red, green, blue].index(max(red, green, blue))]


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"code": status, "message": message}}, status=status)


@asynccontextmanager
async def running(script: Script) -> AsyncIterator[Server]:
    """Run a script on a free port."""
    server = Server(script)
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{tail:.*}", server.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


def _models(*entries: Body) -> Body:
    return {"object": "list", "data": list(entries)}


# vLLM 0.33: vllm/entrypoints/openai


def _vllm_grammar(body: Body) -> str | None:
    given = body.get("structured_outputs") or {}
    if "choice" in given:
        return str(given["choice"][0])
    if "regex" in given:
        return sample(given["regex"])
    return gbnf(given["grammar"]) if "grammar" in given else None


VLLM = Script(
    model="text-only-7b",
    pages={
        "/v1/models": _models({
            "id": "text-only-7b", "object": "model", "created": 1, "owned_by": "vllm",
            "root": "/models/x", "parent": None, "max_model_len": 6144, "permission": [],
        }),
        "/version": {"version": "0.33.0"},
        "/health": "",
    },
    text_grammar=_vllm_grammar,
    formats=("text", "json_object", "json_schema", "structural_tag"),
    headers={"server": "uvicorn"},
)  # fmt: skip

# SGLang 0.5: sglang/srt/entrypoints/http_server.py


def _sglang_grammar(body: Body) -> str | None:
    if "regex" in body:
        return (
            body["regex"].strip("()").split("|")[0]
            if "|" in body["regex"]
            else sample(body["regex"])
        )
    return gbnf(body["ebnf"]) if "ebnf" in body else None


SGLANG = Script(
    model="qwen3-vl-8b",
    pages={
        "/v1/models": _models({
            "id": "qwen3-vl-8b", "object": "model", "created": 1, "owned_by": "sglang",
            "root": "qwen3-vl-8b", "parent": None, "max_model_len": 12288,
        }),
        "/model_info": {
            "model_path": "/models/y", "tokenizer_path": "/models/y", "is_generation": True,
            "preferred_sampling_params": None, "weight_version": "default", "has_image_understanding": False,
            "has_audio_understanding": False, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"],
        },
        "/server_info": {"version": "0.5.10", "quantization": "fp8", "dtype": "auto", "internal_states": []},
        "/health": "",
    },
    text_grammar=_sglang_grammar,
    vision=None,
    thoughts=lambda body: (body.get("chat_template_kwargs") or {}).get("enable_thinking") is not False,
)  # fmt: skip

# LMDeploy 0.18: lmdeploy/serve/openai


def _lmdeploy_grammar(body: Body) -> str | None:
    given = body.get("response_format") or {}
    if given.get("type") != "regex_schema":
        return None
    regex = given["regex_schema"]
    return regex.strip("()").split("|")[0] if "|" in regex else sample(regex)


LMDEPLOY = Script(
    model="captioner",
    pages={
        "/v1/models": _models({
            "id": "captioner", "object": "model", "created": 1, "owned_by": "lmdeploy", "root": "captioner",
            "parent": None, "permission": [],
        }),
        "/health": {"status": "healthy"},
        "/openapi.json": {"openapi": "3.1.0", "info": {"title": "FastAPI", "version": "0.1.0"}},
    },
    text_grammar=_lmdeploy_grammar,
    formats=("text", "json_object", "json_schema", "regex_schema"),
    patterns=False,  # a schema that does not compile is dropped; here the pattern alone
)  # fmt: skip

# llama.cpp, b11549: answers of the real server


def _llama_grammar(body: Body) -> str | None:
    return gbnf(body["grammar"]) if "grammar" in body else None


LLAMA = Script(
    model="vision-model.gguf",
    pages={
        "/v1/models": {
            "models": [{"name": "vision-model.gguf", "capabilities": ["completion"]}],
            **_models({
                "id": "vision-model.gguf", "aliases": ["vision-model.gguf"], "tags": [], "object": "model",
                "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
                "created": 1, "owned_by": "llamacpp",
                "meta": {"vocab_type": 2, "n_vocab": 151936, "n_ctx": 8192, "n_ctx_train": 262144,
                         "n_embd": 2048, "n_params": 1720574976, "size": 1106966528, "ftype": "Q4_K - Medium"},
            }),
        },
        "/props": {
            "default_generation_settings": {"params": {}, "n_ctx": 8192}, "total_slots": 1,
            "model_alias": "vision-model.gguf", "model_ftype": "Q4_K - Medium",
            "modalities": {"vision": False, "video": False, "audio": False}, "build_info": "b11549-abc",
        },
        "/health": {"status": "ok"},
    },
    headers={"server": "llama.cpp"},
    text_grammar=_llama_grammar,
    vision=None,
)  # fmt: skip

# Ollama 0.12: api/types.go and server/routes.go

_OLLAMA_DETAILS = {
    "parent_model": "", "format": "gguf", "family": "qwen3vl", "families": ["qwen3vl"],
    "parameter_size": "2.1B", "quantization_level": "Q4_K_M",
}  # fmt: skip


def _shown(body: Body) -> Body:
    return {
        "details": _OLLAMA_DETAILS, "capabilities": ["completion", "vision"],
        "model_info": {"general.architecture": "qwen3vl", "qwen3vl.context_length": 262144},
    }  # fmt: skip


OLLAMA = Script(
    model="plain:latest",
    pages={
        "/": "Ollama is running",
        "/api/version": {"version": "0.12.9"},
        "/v1/models": _models({"id": "plain:latest", "object": "model", "created": 1, "owned_by": "library"}),
        "/api/tags": {"models": [{
            "name": "plain:latest", "model": "plain:latest", "modified_at": "2026-11-01T00:00:00Z",
            "size": 1900000000, "digest": "aa", "details": _OLLAMA_DETAILS,
        }]},
        "/api/ps": {"models": [{
            "name": "plain:latest", "model": "plain:latest", "size": 2100000000, "digest": "aa",
            "details": _OLLAMA_DETAILS, "expires_at": "2026-11-01T00:05:00Z", "size_vram": 0, "context_length": 4096,
        }]},
        "POST /api/show": _shown,
    },
    ollama=True,
    limits=("num_predict", "max_tokens"),
    schema=lambda body: body.get("format"),
    formats=None,
)  # fmt: skip

# LM Studio 0.4: its REST API v1

LM_STUDIO = Script(
    model="thing",
    pages={
        "/v1/models": _models(
            {"id": "thing", "object": "model", "owned_by": "organization_owner"},
            {"id": "text-embedding", "object": "model", "owned_by": "organization_owner"},
        ),
        # Paths that it does not have get status 200, too.
        "/api/version": {"error": "Unexpected endpoint or method. (GET /api/version)"},
        "/health": {"error": "Unexpected endpoint or method. (GET /health)"},
        "/": {"error": "Unexpected endpoint or method. (GET /)"},
        "/api/v1/models": {"models": [
            {
                "type": "llm", "publisher": "someone", "key": "someone/thing", "display_name": "Thing",
                "architecture": "qwen3vl", "quantization": {"name": "Q4_K_M", "bits_per_weight": 4},
                "size_bytes": 1300000000, "params_string": "2B",
                "loaded_instances": [{"id": "thing", "config": {"context_length": 4096}}],
                "max_context_length": 262144, "format": "gguf",
                "capabilities": {"vision": True, "trained_for_tool_use": True},
            },
            {
                "type": "embedding", "publisher": "someone", "key": "text-embedding", "quantization": None,
                "size_bytes": 1, "params_string": None, "loaded_instances": [], "max_context_length": 2048,
            },
        ]},
    },
    limits=("max_tokens",),
    sampling=("temperature", "top_p", "top_k", "repetition_penalty", "seed"),
    formats=("text", "json_schema"),
)  # fmt: skip

# vLLM-MLX 0.4: vllm_mlx/server.py

VLLM_MLX = Script(
    model="default",
    pages={
        "/v1/models": _models({"id": "default", "object": "model", "created": 1, "owned_by": "vllm-mlx"}),
        "/health": {
            "status": "healthy", "model_loaded": True, "model_name": "default", "model_type": "llm",
            "engine_type": "batched", "mcp": None,
        },
        "/openapi.json": {"info": {"title": "vllm-mlx API", "version": "0.4.1"}},
    },
    limits=("max_tokens",),
    sampling=("temperature", "top_p", "top_k", "repetition_penalty"),
    formats=None,
)  # fmt: skip

# mistral.rs 0.9: mistralrs-server-core


def _mistral_grammar(body: Body) -> str | None:
    given = body.get("grammar") or {}
    if given.get("type") != "regex":
        return None
    regex = given["value"]
    return regex.strip("()").split("|")[0] if "|" in regex else sample(regex)


MISTRAL_RS = Script(
    model="/models/m",
    pages={
        "/v1/models": _models(
            {"id": "default", "object": "model", "created": 1, "owned_by": "local", "root": "default"},
            {
                "id": "/models/m", "object": "model", "created": 1, "owned_by": "local", "root": "/models/m",
                "status": "loaded",
            },
        ),
        "/v1/system/info": {"os": "Linux", "build": {"version": "0.9.5", "cuda": False, "git_revision": "abc"}},
        "/health": "OK",
        "/": "OK",
    },
    sampling=("temperature", "top_p", "top_k", "repetition_penalty"),
    text_grammar=_mistral_grammar,
    refusal=422,
)  # fmt: skip

# A server of which nothing is known

UNKNOWN = Script(
    model="gpt-vision",
    pages={"/v1/models": _models({"id": "gpt-vision", "object": "model", "owned_by": "me"})},
    schema=lambda body: None,  # drops schemas
    formats=None,
    vision=False,
    sampling=(),
)

KINDS = {
    "vllm": VLLM,
    "sglang": SGLANG,
    "lmdeploy": LMDEPLOY,
    "llama.cpp": LLAMA,
    "ollama": OLLAMA,
    "lm-studio": LM_STUDIO,
    "vllm-mlx": VLLM_MLX,
    "mistral.rs": MISTRAL_RS,
    "unknown": UNKNOWN,
}


def renamed(script: Script, name: str) -> Script:
    """The same server, with another name for its model."""
    pages = {
        path: page
        if callable(page)
        else json.loads(json.dumps(page).replace(json.dumps(script.model), json.dumps(name)))
        for path, page in script.pages.items()
    }
    return replace(script, pages=pages, model=name)
