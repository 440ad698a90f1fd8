"""Builds remote engines from their settings: one for each model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.engines.remote.engine import RemoteEngine
from service.engines.remote.fleet import BackEndEntry, read_fleet
from service.engines.remote.http_member import HttpMember
from service.engines.remote.members import Member
from service.engines.remote.options import RemoteSettings
from service.engines.remote.wire import Wire, WireOptions

ONLY = "remote"
"""Name of the back end where the settings name one server."""


def build(
    model: str | Path,
    settings: RemoteSettings,
    *,
    revision: str | None,
    max_images: int,
    on_progress: Callable[[str], None] | None,
) -> RemoteEngine:
    """The engine of calls that name no model; see `build_all`."""
    return build_all(
        model, settings, revision=revision, max_images=max_images, on_progress=on_progress
    )[0]


def build_all(
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
        return [RemoteEngine([_only_member(settings)], **options)]
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
