"""The commands that run a model: serve, check, and the server behind ``--local``."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence

import typer
from pydantic import ValidationError

from service import logs
from service.errors import ServiceError
from service.server import VisionServer, serve
from service.settings import Settings, SettingsError, load_settings
from service.types import Chunk, GenerateRequest, Grammar, GrammarKind, Sampling
from service.wiring import build_engine, build_registry

FAILED, USAGE = 1, 2


def serve_command(arguments: Sequence[str]) -> int:
    """Run a server until SIGTERM or Ctrl-C. Returns the exit code."""
    settings = _settings("serve", arguments)
    if settings is None:
        return USAGE
    logs.configure()
    try:
        registry = build_registry(settings)
        engine = build_engine(settings, _progress)
        asyncio.run(serve(settings, engine, registry, on_ready=_announce))
    except (SettingsError, ServiceError, ValueError) as error:
        typer.echo(f"qwen3vl serve: {_text(error)}", err=True)
        return FAILED
    return 0


def check_command(arguments: Sequence[str]) -> int:
    """Try settings, tasks, model and one warm-up; say what is wrong and how to mend it."""
    settings = _settings("check", arguments)
    if settings is None:
        return USAGE
    typer.echo("settings   ok")
    return asyncio.run(_check(settings))


@contextlib.contextmanager
def local_server() -> Iterator[str]:
    """A server of this process on a free loopback port, with the settings of the environment.

    Yields its address. Ends the command with a readable error when it cannot start.
    """
    try:
        settings = load_settings(host="127.0.0.1", port=0)
        server = VisionServer(settings, build_engine(settings, _progress), build_registry(settings))
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


def _settings(command: str, arguments: Sequence[str]) -> Settings | None:
    """Settings from flags and environment; None after a readable message about what is wrong."""
    try:
        return load_settings(
            _cli_parse_args=list(arguments),
            _cli_prog_name=f"qwen3vl {command}",
            _cli_kebab_case=True,
            _cli_implicit_flags=True,
            _cli_hide_none_type=True,
        )
    except (SettingsError, ValidationError) as error:
        typer.echo(f"qwen3vl {command}: {error}", err=True)
        return None


async def _check(settings: Settings) -> int:
    stage = "tasks"
    engine = None
    try:
        registry = build_registry(settings)
        typer.echo(f"tasks      ok: {', '.join(sorted(task.name for task in registry.list()))}")
        stage = "model"
        engine = build_engine(settings, _progress)
        started = time.monotonic()
        await engine.start()
        found = engine.capabilities
        details = ", ".join(f"{key} {value}" for key, value in sorted(found.details.items()))
        typer.echo(
            f"model      ok: {found.model} on the {found.engine} engine, context"
            f" {found.context_length} tokens, loaded in {time.monotonic() - started:.1f} s"
        )
        typer.echo(f"           {details}")
        stage = "warm-up"
        started = time.monotonic()
        last = await _warm_up(engine.generate(_WARM_UP))
        typer.echo(
            f"warm-up    ok: {last.usage.output_tokens} constrained tokens"
            f" in {time.monotonic() - started:.2f} s"
        )
    except (ServiceError, ValueError) as error:
        typer.echo(f"{stage:<10} FAILED: {_text(error)}", err=True)
        return FAILED
    finally:
        if engine is not None:
            await engine.close()
    typer.echo(f"All is well. Start it with: qwen3vl serve --port {settings.port}")
    return 0


_WARM_UP = GenerateRequest(
    "check",
    "Say yes or no.",
    grammar=Grammar(GrammarKind.CHOICE, '["yes", "no"]'),
    sampling=Sampling(max_tokens=8),
)


async def _warm_up(chunks: AsyncIterator[Chunk]) -> Chunk:
    last = Chunk("")
    async for chunk in chunks:
        last = chunk
    return last


def _progress(message: str) -> None:
    print(f"… {message}", file=sys.stderr, flush=True)


def _announce(server: VisionServer) -> None:
    print(f"SERVING on port {server.port}. Stop with Ctrl-C.", file=sys.stderr, flush=True)


def _text(error: Exception) -> str:
    return error.message if isinstance(error, ServiceError) else str(error)
