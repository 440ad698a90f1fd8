"""``qwen3vl discover``: describes model servers, as tables or JSON."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import typer

from service.cli.output import echo
from service.client import open_channel
from service.engines.remote.backend import State
from service.engines.remote.discovery import Discoveries, DiscoveryError, local_urls
from service.engines.remote.reading import Fact, ability
from service.engines.remote.servers import SERVERS
from service.engines.remote.wire import Wire, WireError, WireOptions, parse_url
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.types import GrammarKind

FAILED = 1
GRPC_LIMIT_S = 10.0


@dataclass(frozen=True)
class Request:
    """What to find out. model: only this one; None describes every model of a server. probe: also
    try out what a server does not tell."""

    model: str | None = None
    kind: str | None = None
    probe: bool = True
    limit_s: float = 600.0


@dataclass(frozen=True)
class Found:
    """One model on one server, or the reason why there is none."""

    url: str
    model: str = ""
    facts: tuple[Fact, ...] = ()
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        if self.error:
            return {"url": self.url, "error": self.error}
        return {
            "url": self.url,
            "model": self.model,
            "facts": [one.as_json() for one in self.facts],
        }


def discover(
    urls: Sequence[str], request: Request, key: str | None, ca: Path | None, as_json: bool
) -> int:
    """Describe the servers, or those of this machine where no URL is given. Returns 0, or 1 if a
    server could not be described."""
    if request.kind is not None and request.kind not in SERVERS:
        raise typer.BadParameter(f"--kind {request.kind} is not one of {', '.join(SERVERS)}")
    options = WireOptions(key=key, ca=ca)
    try:
        bases = [_parsed(url) for url in urls]
        found = asyncio.run(_all(bases, request, options))
    except DiscoveryError as error:
        typer.echo(f"error: {error}", err=True)
        return FAILED
    if as_json:
        echo(json.dumps([one.as_json() for one in found], indent=2, ensure_ascii=False))
    else:
        for one in found:
            _print(one)
    if not found:
        typer.echo("error: no model server answers on the usual ports of this machine", err=True)
    return FAILED if not found or any(one.error for one in found) else 0


def _parsed(url: str) -> str:
    try:
        return parse_url(url)
    except ValueError as error:
        raise typer.BadParameter(f"{url!r} {error}") from None


async def _all(bases: Sequence[str], request: Request, options: WireOptions) -> list[Found]:
    """Servers one after the other: two addresses may lead to the same one."""
    found: list[Found] = []
    if not bases:
        bases, options = await local_urls(options), dataclasses.replace(options, key=None)
    for base in bases:
        typer.echo(f"looking at {base} …", err=True)
        if base.startswith("grpc"):
            found.append(await asyncio.to_thread(_over_grpc, base, options))
        else:
            found += await _over_http(base, request, options)
    return found


async def _over_http(base: str, request: Request, options: WireOptions) -> list[Found]:
    discoveries = Discoveries(total_limit_s=request.limit_s)
    wire = Wire(base, options)
    try:
        if request.model is None:
            described = await discoveries.describe_all(wire, kind=request.kind, probe=request.probe)
        else:
            described = [
                await discoveries.describe(
                    wire, kind=request.kind, model=request.model, probe=request.probe
                )
            ]
    except (WireError, DiscoveryError) as error:
        return [Found(base, error=str(error))]
    finally:
        await wire.close()
    return [Found(base, one.back_end.model, one.facts) for one in described]


def _over_grpc(base: str, options: WireOptions) -> Found:
    """A server of this project, which describes itself; nothing has to be tried out."""
    scheme, address = base.split("://")
    tls = scheme == "grpcs"
    channel = open_channel(
        address,
        api_key=options.key,
        tls=tls,
        ca=options.ca,
        cert=options.cert,
        key=options.cert_key,
    )
    try:
        with channel:
            model = VisionServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=GRPC_LIMIT_S)
    except grpc.RpcError as error:
        return Found(base, error=_failure(error))
    return Found(base, model.name, tuple(_own_facts(model)))


def _failure(error: grpc.RpcError) -> str:
    assert isinstance(error, grpc.Call)  # gRPC raises no others
    return f"{error.code().name}: {error.details()}"


def _own_facts(model: pb.GetModelResponse) -> Iterator[Fact]:
    evidence = "GetModel"
    known = model.capabilities
    yield Fact("kind", "qwen3vl-grpc", "it answers GetModel")
    yield Fact("version", model.server_version or State.UNKNOWN, f"{evidence}: server_version")
    yield Fact("context_length", known.context_length, f"{evidence}: context_length")
    yield ability("vision", pb.MODALITY_IMAGE in known.modalities, f"{evidence}: modalities")
    kinds = {pb.GrammarKind.Name(one) for one in known.grammar_kinds}
    for kind in GrammarKind:
        told = f"GRAMMAR_KIND_{kind.name}" in kinds
        yield ability(f"grammar.{kind.value}", told, f"{evidence}: grammar_kinds")
    enforced = known.enforcer == pb.ENFORCER_MASK
    yield ability("enforces_grammars", enforced, f"{evidence}: enforcer")
    for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed"):
        yield ability(
            f"sampling.{name}", name in known.sampling_options, f"{evidence}: sampling_options"
        )
    for name, value in sorted(model.details.items()):
        yield Fact(f"details.{name}", value, f"{evidence}: details")


def _print(found: Found) -> None:
    if found.error:
        typer.echo(f"error: {found.url}: {found.error}", err=True)
        return
    echo(f"{found.url}  {found.model}")
    rows = [(one.name, str(one.as_json()["value"]), one.evidence) for one in found.facts]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, evidence in rows:
        echo(f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {evidence}")
    echo()
