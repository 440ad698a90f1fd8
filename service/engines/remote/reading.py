"""What a model server says about itself: its kind, its version, its models and their properties.

Only fields that a server fills from its own state are read. A name of a model says nothing: an alias
hides that a model sees images, the same model on another runner does not, and the context that is
loaded differs from the one of the training.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from service.engines.remote.backend import State
from service.engines.remote.wire import Reply, Wire, WireError

READ_LIMIT_S = 10.0
"""Maximum time for one page, in seconds."""
SCHEMA_IN_PROMPT = "schema_in_prompt"
"""Name of the fact, for servers of this project."""
PAGES = (
    "/v1/models",
    "/",
    "/version",
    "/health",
    "/props",
    "/model_info",
    "/get_model_info",
    "/server_info",
    "/get_server_info",
    "/api/version",
    "/api/tags",
    "/api/ps",
    "/api/v1/models",
    "/api/v0/models",
    "/v1/system/info",
    "/openapi.json",
)
"""Pages that tell what a server is. None of them generates anything or loads a model."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that is known of a server or of one of its models.

    name: such as ``context_length``, ``vision``, ``grammar.regex`` or ``sampling.seed``.
    value: ``State`` for an ability, else a text or a number; ``State.UNKNOWN`` where nothing is known.
    evidence: where the value comes from, for people.
    """

    name: str
    value: State | str | int
    evidence: str

    @property
    def known(self) -> bool:
        return self.value is not State.UNKNOWN

    def as_json(self) -> dict[str, str | int]:
        value = self.value.value if isinstance(self.value, State) else self.value
        return {"name": self.name, "value": value, "evidence": self.evidence}


def ability(name: str, value: Any, evidence: str) -> Fact:
    """A fact of a value that is true, false or missing."""
    if isinstance(value, bool):
        return Fact(name, State.YES if value else State.NO, evidence)
    return Fact(name, State.UNKNOWN, f"{evidence}: not told")


@dataclass(frozen=True, slots=True)
class Model:
    """A model on a server.

    loaded: whether requests are answered without loading it first; None where that is not told.
    facts: what the server says about it.
    """

    name: str
    loaded: bool | None = None
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """What a server says about itself. version: empty where it does not tell."""

    kind: str
    kind_evidence: str
    version: str
    version_evidence: str
    models: tuple[Model, ...]


class Refused(ValueError):
    """The server answers, but does not tell its models. The text is for people."""


@dataclass(slots=True)
class Pages:
    """The pages of a server that could be read as JSON, by path."""

    headers: Mapping[str, str]
    found: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)

    def object(self, path: str) -> dict[str, Any]:
        """A JSON object; empty where the page is missing or is something else."""
        value = self.found.get(path)
        return value if isinstance(value, dict) else {}

    def entries(self, path: str, name: str = "data") -> list[dict[str, Any]]:
        """The objects of a list in an object."""
        value = self.object(path).get(name)
        return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []

    @property
    def models(self) -> list[dict[str, Any]]:
        return [one for one in self.entries("/v1/models") if _text(one.get("id"))]

    @property
    def owners(self) -> set[str]:
        """Who owns the models; servers write their own name there."""
        return {one["owned_by"] for one in self.models if isinstance(one.get("owned_by"), str)}


async def read(wire: Wire, kind: str | None = None) -> Reading:
    """Read a server. kind: what the operator says it is; None finds out.

    Raises ``Unreachable`` where no connection can be made, and ``Refused`` where the server does not
    list models.
    """
    pages = await _pages(wire)
    said = _kind(pages)
    found, evidence = said if kind is None else (kind, "a setting")
    version, version_evidence = _version(found, pages)
    models = await READERS.get(found, _read_openai)(pages, wire)
    if not models:
        raise Refused(_no_models(pages))
    return Reading(found, evidence, version, version_evidence, tuple(models))


async def _pages(wire: Wire) -> Pages:
    first = await wire.fetch("GET", PAGES[0], limit_s=READ_LIMIT_S)
    pages = Pages(first.headers)
    _keep(pages, PAGES[0], first)
    replies = await asyncio.gather(*(_optional(wire, "GET", path) for path in PAGES[1:]))
    for path, reply in zip(PAGES[1:], replies, strict=True):
        if reply is not None:
            _keep(pages, path, reply)
    return pages


async def _optional(wire: Wire, method: str, path: str, body: bytes | None = None) -> Reply | None:
    """A page that most servers lack; None where it cannot be read."""
    try:
        return await wire.fetch(method, path, body, limit_s=READ_LIMIT_S)
    except WireError:
        return None


def _keep(pages: Pages, path: str, reply: Reply) -> None:
    pages.statuses[path] = reply.status
    if reply.status != 200:
        return
    pages.texts[path] = reply.body[:200].decode(errors="replace")
    try:
        pages.found[path] = reply.json()
    except (ValueError, RecursionError):
        return


def _no_models(pages: Pages) -> str:
    status = pages.statuses["/v1/models"]
    if status in (401, 403):
        return f"the server asks for an API key, or refuses the one that was sent (status {status})"
    if status == 503:
        return "the server is not ready, it may still load its model (status 503)"
    if pages.object("/v1/models").get("data") == []:
        return "the server lists no model in /v1/models"
    return f"the server does not list its models in /v1/models, which has status {status}; the URL may be wrong"


# Kinds


def _kind(pages: Pages) -> tuple[str, str]:
    """The kind of a server, and the evidence."""
    for kind, rule in RULES:
        if evidence := rule(pages):
            return kind, evidence
    return "unknown", "no page that tells the kind of the server"


def _owned_by(name: str) -> Callable[[Pages], str]:
    return lambda pages: f'/v1/models: owned_by "{name}"' if name in pages.owners else ""


def _is_llama_cpp(pages: Pages) -> str:
    if pages.headers.get("server") == "llama.cpp":
        return "header server: llama.cpp"
    return _owned_by("llamacpp")(pages)


def _is_ollama(pages: Pages) -> str:
    told = _text(pages.object("/api/version").get("version"))
    running = pages.texts.get("/", "").startswith("Ollama is running")
    return "/ says that Ollama is running" if told and running else ""


def _is_lm_studio(pages: Pages) -> str:
    if any("loaded_instances" in one for one in pages.entries("/api/v1/models", "models")):
        return "/api/v1/models lists loaded_instances"
    if any("compatibility_type" in one for one in pages.entries("/api/v0/models")):
        return "/api/v0/models lists compatibility_type"
    return ""


def _is_sglang(pages: Pages) -> str:
    for path in ("/model_info", "/get_model_info"):
        if {"model_path", "is_generation"} <= pages.object(path).keys():
            return f"{path} has model_path and is_generation"
    return _owned_by("sglang")(pages)


def _is_mistral_rs(pages: Pages) -> str:
    build = pages.object("/v1/system/info").get("build")
    if isinstance(build, dict) and "git_revision" in build:
        return "/v1/system/info has build.git_revision"
    if pages.owners == {"local"} and pages.models[0]["id"] == "default":
        return '/v1/models: owned_by "local", and an entry "default"'
    return ""


RULES: tuple[tuple[str, Callable[[Pages], str]], ...] = (
    ("qwen3vl-http", _owned_by("qwen3vl")),
    ("llama.cpp", _is_llama_cpp),
    ("ollama", _is_ollama),
    ("lm-studio", _is_lm_studio),
    ("sglang", _is_sglang),
    ("vllm-mlx", _owned_by("vllm-mlx")),
    ("vllm", _owned_by("vllm")),
    ("lmdeploy", _owned_by("lmdeploy")),
    ("mistral.rs", _is_mistral_rs),
)
"""Kinds and how each is recognised, in the order in which they are tried."""

VERSIONS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "qwen3vl-http": (("/openapi.json", ("info", "version")),),
    "llama.cpp": (("/props", ("build_info",)),),
    "ollama": (("/api/version", ("version",)),),
    "sglang": (("/server_info", ("version",)), ("/get_server_info", ("version",))),
    "vllm-mlx": (("/openapi.json", ("info", "version")),),
    "vllm": (("/version", ("version",)),),
    "mistral.rs": (("/v1/system/info", ("build", "version")),),
}
"""Kind -> pages, and the keys to the version in them. LMDeploy and LM Studio do not tell it."""


def _version(kind: str, pages: Pages) -> tuple[str, str]:
    for path, keys in VERSIONS.get(kind, ()):
        value: Any = pages.object(path)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if _text(value):
            return str(value), f"{path}: {'.'.join(keys)}"
    return "", "no page that tells it"


# Models


async def _read_openai(pages: Pages, wire: Wire) -> list[Model]:
    """Ids only, as of a server of which nothing else is known."""
    return [Model(one["id"], facts=_context(one)) for one in pages.models]


def _context(entry: Mapping[str, Any]) -> tuple[Fact, ...]:
    """The length of the context, which several servers add to their models."""
    return _counted("context_length", entry.get("max_model_len"), "/v1/models: max_model_len")


async def _read_sglang(pages: Pages, wire: Wire) -> list[Model]:
    path = "/model_info" if pages.object("/model_info") else "/get_model_info"
    info = pages.object(path)
    server = pages.object("/server_info") or pages.object("/get_server_info")
    facts = [
        ability("vision", info.get("has_image_understanding"), f"{path}: has_image_understanding")
    ]
    for name in ("quantization", "dtype"):
        if _text(server.get(name)):
            facts.append(Fact(name, server[name], f"/server_info: {name}"))
    return [Model(one["id"], True, (*_context(one), *facts)) for one in pages.models]


async def _read_llama_cpp(pages: Pages, wire: Wire) -> list[Model]:
    """One model, or several of a router, which describes them in /v1/models only."""
    props = pages.object("/props")
    alone = len(pages.models) == 1
    found = []
    for entry in pages.models:
        meta = entry["meta"] if isinstance(entry.get("meta"), dict) else {}
        settings = props.get("default_generation_settings")
        length = settings.get("n_ctx") if alone and isinstance(settings, dict) else None
        facts = [
            *_counted("context_length", length, "/props: default_generation_settings.n_ctx"),
            *_counted("trained_context_length", meta.get("n_ctx_train"), "/v1/models: meta.n_ctx_train"),
            *_counted("parameters", meta.get("n_params"), "/v1/models: meta.n_params"),
            *_counted("size_bytes", meta.get("size"), "/v1/models: meta.size"),
        ]  # fmt: skip
        if not any(fact.name == "context_length" for fact in facts):
            facts += _counted("context_length", meta.get("n_ctx"), "/v1/models: meta.n_ctx")
        quantization = meta.get("ftype") or (props.get("model_ftype") if alone else None)
        if _text(quantization):
            facts.append(Fact("quantization", str(quantization), "/v1/models: meta.ftype"))
        facts.append(_llama_vision(props if alone else {}, entry))
        status = entry.get("status")
        loaded = status.get("value") == "loaded" if isinstance(status, dict) else True
        found.append(Model(entry["id"], loaded, tuple(facts)))
    return found


def _llama_vision(props: Mapping[str, Any], entry: Mapping[str, Any]) -> Fact:
    modalities = props.get("modalities")
    if isinstance(modalities, dict) and isinstance(modalities.get("vision"), bool):
        return ability("vision", modalities["vision"], "/props: modalities.vision")
    architecture = entry.get("architecture")
    inputs = architecture.get("input_modalities") if isinstance(architecture, dict) else None
    told = "image" in inputs if isinstance(inputs, list) else None
    return ability("vision", told, "/v1/models: architecture.input_modalities")


async def _read_ollama(pages: Pages, wire: Wire) -> list[Model]:
    running = {one.get("model"): one for one in pages.entries("/api/ps", "models")}
    entries = [one for one in pages.entries("/api/tags", "models") if _text(one.get("model"))]
    shown = await asyncio.gather(*(_shown(wire, one["model"]) for one in entries))
    return [
        _ollama_model(entry, show, running.get(entry["model"]))
        for entry, show in zip(entries, shown, strict=True)
    ]


async def _shown(wire: Wire, model: str) -> dict[str, Any]:
    body = json.dumps({"model": model}).encode()
    reply = await _optional(wire, "POST", "/api/show", body)
    try:
        value = reply.json() if reply is not None and reply.status == 200 else {}
    except (ValueError, RecursionError):
        value = {}
    return value if isinstance(value, dict) else {}


def _ollama_model(
    entry: dict[str, Any], show: dict[str, Any], running: dict[str, Any] | None
) -> Model:
    capabilities = show.get("capabilities")
    listed = capabilities if isinstance(capabilities, list) else None
    details = entry["details"] if isinstance(entry.get("details"), dict) else {}
    facts = [
        ability(
            "vision", "vision" in listed if listed is not None else None, "/api/show: capabilities"
        ),
        *_counted(
            "context_length", (running or {}).get("context_length"), "/api/ps: context_length"
        ),
        *_counted("size_bytes", entry.get("size"), "/api/tags: size"),
    ]
    if listed is not None and "thinking" not in listed:
        facts.append(ability("thinking", False, "/api/show: capabilities"))
    for name, key in (("quantization", "quantization_level"), ("parameters", "parameter_size")):
        if _text(details.get(key)):
            facts.append(Fact(name, details[key], f"/api/tags: details.{key}"))
    info = show["model_info"] if isinstance(show.get("model_info"), dict) else {}
    trained = info.get(f"{info.get('general.architecture')}.context_length")
    facts += _counted("trained_context_length", trained, "/api/show: model_info")
    return Model(entry["model"], running is not None, tuple(facts))


async def _read_lm_studio(pages: Pages, wire: Wire) -> list[Model]:
    found = []
    for entry in pages.entries("/api/v1/models", "models"):
        if entry.get("type") != "embedding" and _text(entry.get("key")):
            found += _lm_studio_models(entry)
    if found:
        return found
    return [
        _old_lm_studio_model(entry)
        for entry in pages.entries("/api/v0/models")
        if entry.get("type") in ("llm", "vlm") and _text(entry.get("id"))
    ]


def _lm_studio_models(entry: dict[str, Any]) -> list[Model]:
    """The loaded instances of a model, or the model itself."""
    path = "/api/v1/models"
    capabilities = entry.get("capabilities")
    told = capabilities.get("vision") if isinstance(capabilities, dict) else None
    quantization = entry.get("quantization")
    name = quantization.get("name") if isinstance(quantization, dict) else None
    facts = [
        ability("vision", told, f"{path}: capabilities.vision"),
        *_counted("trained_context_length", entry.get("max_context_length"), f"{path}: max_context_length"),
        *_counted("size_bytes", entry.get("size_bytes"), f"{path}: size_bytes"),
    ]  # fmt: skip
    if _text(name):
        facts.append(Fact("quantization", str(name), f"{path}: quantization.name"))
    if _text(entry.get("params_string")):
        facts.append(Fact("parameters", entry["params_string"], f"{path}: params_string"))
    instances = entry.get("loaded_instances")
    found = []
    for one in instances if isinstance(instances, list) else []:
        if isinstance(one, dict) and _text(one.get("id")):
            config = one["config"] if isinstance(one.get("config"), dict) else {}
            evidence = f"{path}: loaded_instances.config.context_length"
            length = _counted("context_length", config.get("context_length"), evidence)
            found.append(Model(one["id"], True, (*length, *facts)))
    return found or [Model(entry["key"], False, tuple(facts))]


def _old_lm_studio_model(entry: dict[str, Any]) -> Model:
    """In the spelling of LM Studio before 0.4."""
    path = "/api/v0/models"
    facts = [
        ability("vision", entry["type"] == "vlm", f"{path}: type"),
        *_counted("context_length", entry.get("loaded_context_length"), f"{path}: loaded_context_length"),
        *_counted("trained_context_length", entry.get("max_context_length"), f"{path}: max_context_length"),
    ]  # fmt: skip
    if _text(entry.get("quantization")):
        facts.append(Fact("quantization", entry["quantization"], f"{path}: quantization"))
    return Model(entry["id"], entry.get("state") == "loaded", tuple(facts))


async def _read_vllm_mlx(pages: Pages, wire: Wire) -> list[Model]:
    """Ids only: ``model_type`` of its /health is a guess from the name until a model is loaded."""
    loaded = pages.object("/health").get("model_loaded")
    state = loaded if isinstance(loaded, bool) else None
    return [Model(one["id"], state) for one in pages.models if one.get("owned_by") == "vllm-mlx"]


async def _read_mistral_rs(pages: Pages, wire: Wire) -> list[Model]:
    """``default`` is another name of one of the models, and listed only where it is alone."""
    named = [one for one in pages.models if one["id"] != "default" and not one.get("parent")]
    return [
        Model(one["id"], one["status"] == "loaded" if _text(one.get("status")) else None)
        for one in named or pages.models
    ]


async def _read_own(pages: Pages, wire: Wire) -> list[Model]:
    found = []
    for entry in pages.models:
        inputs = entry.get("input_modalities")
        told = "image" in inputs if isinstance(inputs, list) else None
        vision = ability("vision", told, "/v1/models: input_modalities")
        shown = ability(
            SCHEMA_IN_PROMPT, entry.get("schema_in_prompt"), "/v1/models: schema_in_prompt"
        )
        found.append(Model(entry["id"], True, (*_context(entry), vision, shown)))
    return found


READERS = {
    "qwen3vl-http": _read_own,
    "llama.cpp": _read_llama_cpp,
    "ollama": _read_ollama,
    "lm-studio": _read_lm_studio,
    "sglang": _read_sglang,
    "vllm-mlx": _read_vllm_mlx,
    "mistral.rs": _read_mistral_rs,
}
"""Kind -> how its models are read; others tell ids, and the context in ``max_model_len``."""


def _counted(name: str, value: Any, evidence: str) -> tuple[Fact, ...]:
    return (Fact(name, int(value), evidence),) if _count(value) else ()


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""
