"""Runs a server for ``qwen3vl serve``, or inside a command for ``--local``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from service import heap, logs, metrics
from service.cli.arguments import read_settings, with_flag
from service.cli.front_ends import build_front_ends, places
from service.errors import ServiceError
from service.grpc_api.connections import raise_descriptor_limit
from service.grpc_api.server import GrpcFrontEnd, VisionServer
from service.runtime import FrontEnd, Runtime, end_soon, serve
from service.settings import UNSERVED, Settings, SettingsError, load_settings
from service.wiring import build_engines, build_pool, build_registry

if TYPE_CHECKING:
    from service.http_api.server import HttpFrontEnd

log = logging.getLogger(__name__)

FAILED, USAGE = 1, 2


def serve_command(arguments: Sequence[str]) -> int:
    """Run a server until SIGTERM or Ctrl-C. Returns the exit code."""
    settings = read_settings("serve", arguments)
    if settings is None:
        return USAGE
    logs.configure(settings.log_level, settings.log_format, on_drop=metrics.log_lines_dropped.inc)
    logs.dump_on_signal()
    heap.limit()
    raise_descriptor_limit()
    try:
        registry = build_registry(settings)
        engines = build_engines(settings, partial(logs.console.info, "… %s"))
        pool = build_pool(settings)
        runtime = Runtime(settings, engines, registry, pool=pool)
        front_ends = build_front_ends(runtime)
        ready = partial(_announce, front_ends)
        _run(settings)(_serve_and_end(runtime, front_ends, ready))
    except (SettingsError, ServiceError, ValueError) as error:
        # Not printed: where nobody reads stderr, that would keep the process from ending.
        logs.console.error("qwen3vl serve: %s", _text(error))
        return FAILED
    except Exception:
        log.exception("the server ends because of a defect")
        return FAILED
    return 0


def _run(settings: Settings) -> Callable[[Coroutine[Any, Any, None]], None]:
    """What runs the server in an event loop of the kind that the settings name."""
    if settings.event_loop == "asyncio":
        return asyncio.run
    import uvloop

    return uvloop.run


async def _serve_and_end(
    runtime: Runtime, front_ends: Sequence[FrontEnd], ready: Callable[[], None]
) -> None:
    """Serve; then the process ends soon, whatever its threads still do."""
    code = FAILED
    try:
        await serve(runtime, front_ends, on_ready=ready)
        code = 0
    finally:
        end_soon(code)


@contextlib.contextmanager
def local_server() -> Iterator[str]:
    """Run a server in this process on a free loopback port, with the settings of the environment.

    Yields its address. Ends the command with an error message if the server cannot start.
    """
    try:
        settings = load_settings(**UNSERVED)
        engines = build_engines(settings, progress)
        server = VisionServer(settings, engines, build_registry(settings))
    except (SettingsError, ServiceError, ValueError) as error:
        typer.echo(_text(error), err=True)
        raise typer.Exit(FAILED) from None
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="local-server", daemon=True)
    thread.start()

    async def up() -> None:
        await server.start()
        await server.load()

    try:
        try:
            asyncio.run_coroutine_threadsafe(up(), loop).result()
        except (SettingsError, ServiceError) as error:
            typer.echo(_text(error), err=True)
            raise typer.Exit(FAILED) from None
        yield f"127.0.0.1:{server.port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def progress(message: str) -> None:
    """Print the current step of loading to stderr; stdout has only answers."""
    print(f"… {message}", file=sys.stderr, flush=True)


def _announce(front_ends: Sequence[GrpcFrontEnd | HttpFrontEnd]) -> None:
    logs.trace_crashes()  # after the engine has imported its libraries
    logs.console.info("SERVING on %s. Stop with Ctrl-C.", places(front_ends))


def _text(error: Exception) -> str:
    if isinstance(error, ServiceError):
        return error.message
    return "\n".join(with_flag(line) for line in str(error).splitlines())
