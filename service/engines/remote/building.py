"""Builds remote engines from their settings: one for each model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from service.engines.remote.discovery import DiscoveryError, only_local_url
from service.engines.remote.engine import RemoteEngine
from service.engines.remote.fleet import BackEndEntry, ModelEntry, read_fleet
from service.engines.remote.http_member import HttpMember
from service.engines.remote.images import Sizing
from service.engines.remote.members import Member, NotBegun
from service.engines.remote.options import RemoteSettings
from service.engines.remote.wire import Wire, WireOptions
from service.errors import EngineUnavailable

log = logging.getLogger(__name__)

ONLY = "remote"
"""Name of the back end where the settings name one server."""


def build(
    model: str | Path,
    settings: RemoteSettings,
    *,
    revision: str | None,
    max_images: int,
    on_progress: Callable[[str], None] | None,
) -> list[RemoteEngine]:
    """Build the engines for the registry; see `service.engines.kind.BuildSeveral`. Models and
    revisions are chosen on the servers that run them.

    Raises ``ValueError`` for a file of back ends or keys that cannot be used.
    """
    options: dict[str, Any] = {
        "max_images": max_images,
        "retries": settings.remote_retries,
        "start_s": settings.remote_start_s,
        "on_progress": on_progress,
    }
    if settings.remote_file is None:
        options |= {"vision": settings.vision, "context_length": settings.context_length}
        if settings.remote_discover:
            find = partial(_found_member, settings)
            return [RemoteEngine([], sizing=_sizing(settings), find=find, **options)]
        return [RemoteEngine([_only_member(settings)], sizing=_sizing(settings), **options)]
    fleet = read_fleet(settings.remote_file)
    return [
        RemoteEngine(
            [
                _member(one, fleet.backends[one], entry.model or name, settings)
                for one in entry.backends
            ],
            name=name,
            patient=len(fleet.models) > 1,
            vision=settings.vision and entry.vision,
            context_length=entry.context_length,
            sizing=_sizing(settings, entry),
            **options,
        )
        for name, entry in fleet.models.items()
    ]


def _only_member(settings: RemoteSettings) -> Member:
    """The server of ``remote_url``."""
    assert settings.remote_url is not None
    files = {
        name: None if path is None else str(path)
        for name, path in (
            ("ca", settings.remote_ca),
            ("cert", settings.remote_cert),
            ("cert_key", settings.remote_cert_key),
        )
    }
    entry = BackEndEntry(url=settings.remote_url, kind=settings.remote_kind, **files)
    return _member(ONLY, entry, settings.remote_model, settings, settings.key)


async def _found_member(settings: RemoteSettings) -> Member:
    """The server of this machine. Raises ``NotBegun`` where none answers, or several do."""
    try:
        url = await only_local_url()
    except DiscoveryError as error:
        raise NotBegun(_not_found(str(error)), permanent=True) from None
    if url is None:
        raise NotBegun(
            _not_found("no model server answers at VLLM_MLX_ENDPOINT, or on the usual ports")
        )
    log.info("found a model server: %s", url)
    entry = BackEndEntry(url=url, kind=settings.remote_kind)
    return _member(ONLY, entry, settings.remote_model, settings)


def _not_found(text: str) -> EngineUnavailable:
    return EngineUnavailable(text, reason="BACKEND_UNREACHABLE")


def _member(
    name: str,
    entry: BackEndEntry,
    model: str | None,
    settings: RemoteSettings,
    key: str | None = None,
) -> Member:
    options = WireOptions(
        key=key or entry.key,
        ca=entry.ca,
        cert=entry.cert,
        cert_key=entry.cert_key,
        connect_s=settings.remote_connect_s,
    )
    if entry.url.startswith("grpc"):
        from service.engines.remote.grpc_member import GrpcMember

        return GrpcMember(
            name,
            entry.url,
            model,
            options,
            silence_s=settings.remote_silence_s,
            limit=settings.remote_connections,
        )
    return HttpMember(
        name,
        Wire(entry.url, options),
        model,
        entry.kind,
        stream=settings.remote_stream,
        silence_s=settings.remote_silence_s,
        limit=settings.remote_connections,
        probe=settings.remote_probe,
    )


def _sizing(settings: RemoteSettings, entry: ModelEntry | None = None) -> Sizing:
    """The size in which images are sent: as the model says in the file, or the settings."""
    given = (
        {} if entry is None else entry.model_dump(include={"resize", "min_pixels", "max_pixels"})
    )
    chosen = {
        "resize": settings.remote_resize,
        "min_pixels": settings.remote_min_pixels,
        "max_pixels": settings.remote_max_pixels,
        **{name: value for name, value in given.items() if value is not None},
    }
    if chosen["min_pixels"] > chosen["max_pixels"]:
        raise ValueError("min_pixels of a model must not be above its max_pixels")
    return Sizing(**chosen)
