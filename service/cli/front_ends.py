"""The front ends of a server, by its settings."""

from __future__ import annotations

from collections.abc import Sequence

from service.grpc_api.server import GrpcFrontEnd
from service.http_api.server import HttpFrontEnd
from service.runtime import Runtime


def build_front_ends(runtime: Runtime) -> list[GrpcFrontEnd | HttpFrontEnd]:
    """gRPC, and HTTP where it has a port."""
    found: list[GrpcFrontEnd | HttpFrontEnd] = [GrpcFrontEnd(runtime)]
    if runtime.settings.http_port is not None:
        found.append(HttpFrontEnd(runtime))
    return found


def places(front_ends: Sequence[GrpcFrontEnd | HttpFrontEnd]) -> str:
    """Where the front ends listen, for people."""
    return ", ".join(front_end.place for front_end in front_ends)
