"""Describes model servers: what they say about themselves, and what probes find out.

Probes take dozens of short requests, so their results are kept for each URL, model and version, and
renewed when one of them changes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from service.engines.remote import probes
from service.engines.remote.backend import NOTHING_KNOWN, BackEnd, Finding, State
from service.engines.remote.reading import (
    SCHEMA_IN_PROMPT,
    Fact,
    Model,
    Reading,
    Refused,
    read,
)
from service.engines.remote.servers import SERVERS
from service.engines.remote.wire import Wire, WireError, WireOptions, parse_url
from service.types import GrammarKind

LOCAL_PORTS = {
    8080: "llama.cpp",
    11434: "Ollama",
    1234: "LM Studio or mistral.rs",
    8000: "vLLM or vLLM-MLX",
    23333: "LMDeploy",
    30000: "SGLang",
}
"""Ports on which the servers listen unless they are told otherwise."""
VLLM_MLX_ENDPOINT = "VLLM_MLX_ENDPOINT"
"""Environment variable with the URL of a vLLM-MLX server, which is looked at first."""
_PROPERTIES = ("token_limit", "context_length", "version", "kind")


class DiscoveryError(ValueError):
    """A server cannot be described. The text says why, and is for operators."""


@dataclass(frozen=True, slots=True)
class Description:
    """One model on one server, as facts with their evidence, and as the engine uses it.

    facts: in the order in which they are shown.
    """

    back_end: BackEnd
    facts: tuple[Fact, ...]

    def fact(self, name: str) -> Fact | None:
        """A fact by its name."""
        return next((one for one in self.facts if one.name == name), None)

    def as_json(self) -> dict[str, Any]:
        return {
            "url": self.back_end.url,
            "model": self.back_end.model,
            "facts": [fact.as_json() for fact in self.facts],
        }


@dataclass(slots=True)
class Discoveries:
    """Descriptions, and what probes found. Belongs to one event loop.

    ask_limit_s: maximum time of one probe in seconds; total_limit_s: of all probes of a model.
    """

    ask_limit_s: float = probes.ASK_LIMIT_S
    total_limit_s: float = probes.TOTAL_LIMIT_S
    _kept: dict[tuple[str, str, str, str], tuple[Fact, ...]] = field(default_factory=dict)

    async def describe(
        self, wire: Wire, *, kind: str | None = None, model: str | None = None, probe: bool = True
    ) -> Description:
        """Describe one model: the named one, or the only one.

        kind: what the operator says the server is; None reads it. probe: also try out what the
        server does not tell. Raises ``WireError`` for a server that does not answer and
        ``DiscoveryError`` for one without such a model.
        """
        reading = await _reading(wire, kind)
        return await self._described(wire, reading, _chosen(reading, model), probe)

    async def describe_all(
        self, wire: Wire, *, kind: str | None = None, probe: bool = True
    ) -> list[Description]:
        """Describe every model of a server. Models that would have to be loaded are read only."""
        reading = await _reading(wire, kind)
        return [
            await self._described(wire, reading, one, probe and one.loaded is not False)
            for one in reading.models
        ]

    def forget(self, url: str) -> None:
        """Probe a server anew at the next description, as after a restart that it does not tell."""
        for key in [key for key in self._kept if key[0] == url]:
            del self._kept[key]

    async def _described(
        self, wire: Wire, reading: Reading, model: Model, probe: bool
    ) -> Description:
        key = (wire.base, reading.kind, model.name, reading.version)
        for old in [one for one in self._kept if one[:3] == key[:3] and one != key]:
            del self._kept[old]
        if probe and key not in self._kept:
            server = SERVERS[reading.kind]
            asker = probes.Asker(
                wire, server, model.name, server.token_limit, self.ask_limit_s, self.total_limit_s
            )
            found = await probes.probe(asker, {fact.name: fact for fact in model.facts})
            if len(asker.names) == 1:
                found.append(Fact("answers_as", next(iter(asker.names)), "model of every answer"))
            self._kept[key] = tuple(found)
        return _description(wire.base, reading, model, self._kept.get(key, ()))


async def _reading(wire: Wire, kind: str | None) -> Reading:
    try:
        return await read(wire, kind)
    except Refused as error:
        raise DiscoveryError(str(error)) from None


def _chosen(reading: Reading, name: str | None) -> Model:
    """The model for requests. A server with several needs a name, unless one of them is loaded."""
    names = ", ".join(one.name for one in reading.models[:20])
    if name is not None:
        for one in reading.models:
            if one.name == name:
                return one
        raise DiscoveryError(f"the server has no model {name!r}; it has: {names}")
    loaded = [one for one in reading.models if one.loaded]
    for candidates in (reading.models, loaded):
        if len(candidates) == 1:
            return candidates[0]
    raise DiscoveryError(f"the server has several models, and one must be named: {names}")


def _description(url: str, reading: Reading, model: Model, probed: tuple[Fact, ...]) -> Description:
    facts = {
        "kind": Fact("kind", reading.kind, reading.kind_evidence),
        "version": Fact("version", reading.version or State.UNKNOWN, reading.version_evidence),
        "loaded": _loaded(model),
        "context_length": Fact("context_length", State.UNKNOWN, "no page that tells it"),
        "vision": Fact("vision", State.UNKNOWN, "not told, and not probed"),
    }
    for fact in (*model.facts, *probed):
        if fact.known or fact.name not in facts or not facts[fact.name].known:
            facts[fact.name] = fact
    for name in ("quantization", "size_bytes"):
        facts.setdefault(name, Fact(name, State.UNKNOWN, "no page that tells it"))
    return Description(_back_end(url, reading, model, facts), tuple(facts.values()))


def _loaded(model: Model) -> Fact:
    state = {True: State.YES, False: State.NO, None: State.UNKNOWN}[model.loaded]
    return Fact("loaded", state, "the list of models" if model.loaded is not None else "not told")


def _back_end(url: str, reading: Reading, model: Model, facts: Mapping[str, Fact]) -> BackEnd:
    limit, names = facts.get("token_limit"), facts.get("answers_as")
    length = facts["context_length"].value
    known = {
        name: str(fact.value)
        for name, fact in facts.items()
        if fact.known and not isinstance(fact.value, State) and name not in _PROPERTIES
    }
    return BackEnd(
        url=url,
        kind=reading.kind,
        model=model.name,
        version=reading.version,
        answers_as=str(names.value) if names is not None else "",
        context_length=length if isinstance(length, int) else None,
        vision=_finding(facts.get("vision")),
        grammars={kind: _finding(facts.get(f"grammar.{kind.value}")) for kind in GrammarKind},
        sampling={
            name: _finding(facts.get(f"sampling.{name}"))
            for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
        },
        token_limit=str(limit.value) if limit is not None and limit.known else None,
        thinking=_finding(facts.get("thinking")),
        schema_in_prompt=_finding(facts.get(SCHEMA_IN_PROMPT)).state is State.YES,
        details=known,
    )


def _finding(fact: Fact | None) -> Finding:
    if fact is None or not isinstance(fact.value, State):
        return NOTHING_KNOWN
    return Finding(fact.value, fact.evidence)


async def local_urls(options: WireOptions | None = None, limit_s: float = 2.0) -> list[str]:
    """URLs of model servers on this machine that answer: ``VLLM_MLX_ENDPOINT`` first, then the usual
    ports. No API key is sent to a port that was not named.

    Raises ``DiscoveryError`` for a ``VLLM_MLX_ENDPOINT`` that is no URL.
    """
    named = _named_endpoint()
    first = [] if named is None else [named]
    candidates = first + [f"http://127.0.0.1:{port}" for port in LOCAL_PORTS]
    unique = list(dict.fromkeys(candidates))
    keyless = dataclasses.replace(options or WireOptions(), key=None, connect_s=limit_s)
    answers = await asyncio.gather(*(_answers(one, keyless, limit_s) for one in unique))
    return [one for one, answered in zip(unique, answers, strict=True) if answered]


async def only_local_url(options: WireOptions | None = None) -> str | None:
    """URL of the model server on this machine: at ``VLLM_MLX_ENDPOINT`` where that is set, else the
    only one on the usual ports. None: it does not answer yet.

    Raises ``DiscoveryError`` where several answer, or for a ``VLLM_MLX_ENDPOINT`` that is no URL.
    """
    named = _named_endpoint()
    found = await local_urls(options)
    if named is not None:
        return named if named in found else None
    if len(found) > 1:
        raise DiscoveryError(
            f"several model servers answer on this machine: {', '.join(found)}; name one (remote_url)"
        )
    return found[0] if found else None


def _named_endpoint() -> str | None:
    """The base URL in ``VLLM_MLX_ENDPOINT``. Raises ``DiscoveryError``."""
    named = os.environ.get(VLLM_MLX_ENDPOINT, "").strip()
    try:
        return parse_url(named) if named else None
    except ValueError as error:
        raise DiscoveryError(f"{VLLM_MLX_ENDPOINT} {error}") from None


async def _answers(url: str, options: WireOptions, limit_s: float) -> bool:
    """Whether a server with OpenAI's API answers, and has loaded: this server, while it starts, may
    listen on one of the ports itself."""
    wire = Wire(url, options)
    try:
        reply = await wire.fetch("GET", "/v1/models", limit_s=limit_s)
        return reply.status in (401, 403) or (
            reply.status == 200 and isinstance(reply.json(), dict)
        )
    except (WireError, ValueError, RecursionError):
        return False
    finally:
        await wire.close()
