"""The front ends of a server, by its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from service.grpc_api.server import GrpcFrontEnd
from service.runtime import Runtime

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from service.http_api.server import HttpFrontEnd


def build_front_ends(runtime: Runtime) -> list[GrpcFrontEnd | HttpFrontEnd]:
    """gRPC, and HTTP where it has a port."""
    found: list[GrpcFrontEnd | HttpFrontEnd] = [GrpcFrontEnd(runtime)]
    if runtime.settings.http_port is not None:
        from service.http_api.server import HttpFrontEnd  # a server without HTTP starts sooner

        found.append(HttpFrontEnd(runtime, further_routes(runtime)))
    return found


def further_routes(runtime: Runtime) -> list[BaseRoute]:
    """What the HTTP port serves beside OpenAI's API."""
    from service.http_api.playground import playground_routes

    methods = connect_routes(runtime)
    served = methods and runtime.settings.serves_playground  # the page calls these methods
    return [*(playground_routes() if served else []), *methods]


def connect_routes(runtime: Runtime) -> list[BaseRoute]:
    """The gRPC API as JSON over HTTP, where the library for it is installed."""
    from starlette.routing import Route

    try:
        from service.grpc_api import connect
    except ModuleNotFoundError as error:
        if error.name != "connectrpc":
            raise
        return []
    return [Route(connect.PATH, connect.ConnectApi(runtime))]


def places(front_ends: Sequence[GrpcFrontEnd | HttpFrontEnd]) -> str:
    """Where the front ends listen, for people."""
    return ", ".join(front_end.place for front_end in front_ends)
