"""``qwen3vl check``: runs the start-up steps of ``serve`` one by one; prints the failing step and
the reason."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import typer

from service.cli.arguments import read_settings, with_flag
from service.cli.effective import FLAG, print_settings
from service.cli.front_ends import build_front_ends
from service.engine import Engine
from service.errors import ServiceError
from service.inference.pipeline import schema_limits
from service.runtime import Runtime
from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.settings import Settings
from service.tasks.registry import TaskSourceError, try_grammars
from service.types import (
    Chunk,
    GenerateRequest,
    Grammar,
    GrammarKind,
    Image,
    Modality,
    Sampling,
)
from service.wiring import build_engines, build_pool, build_registry

FAILED, USAGE = 1, 2

FIX = {
    "tasks": "Fix the files, or set --tasks-dir (QWEN3VL_TASKS_DIR) to another folder.",
    "engine": "",
    "port": "",
    "workers": "They run as children of the server: python -m service.structured_output.worker.",
    "model": (
        "--model (QWEN3VL_MODEL) is {model}: give 'bundled', a checkpoint folder, or a hub name."
    ),
    "warm-up": "The model was loaded but does not generate. {remedy}",
}
"""Step -> advice when the step fails."""
REMEDY = {
    "reference": "Try --dtype float32 --device cpu.",
    "lmdeploy": "LMDeploy's own log says more. Try --backend pytorch, or --engine reference.",
    "remote": "The log of the server that runs the model says more.",
    "fake": "",
}
REINSTALL = "A package is missing or broken. Install this one again, with its dependencies."


def check_command(arguments: Sequence[str], progress: Callable[[str], None]) -> int:
    """Check settings, tasks, port, model and one warm-up. Returns the exit code."""
    flags = [argument for argument in arguments if argument != FLAG]
    settings = read_settings("check", flags)
    if settings is None:
        return USAGE
    if len(flags) < len(arguments):
        print_settings(settings, flags)
        return 0
    logging.getLogger().addHandler(logging.NullHandler())  # the failed step has printed the error
    _passed("settings", "valid")
    return asyncio.run(_check(settings, progress))


async def _check(settings: Settings, progress: Callable[[str], None]) -> int:
    stage = "tasks"
    runtime: Runtime | None = None
    try:
        registry = build_registry(settings)
        _passed(stage, ", ".join(task.name for task in registry.list()))
        stage = "engine"
        engines = build_engines(settings, progress)
        pool = build_pool(settings)
        stage = "port"
        runtime = Runtime(settings, engines, registry, pool=pool)
        await runtime.start(build_front_ends(runtime))
        _passed(stage, f"{settings.address} is free, {_security(settings)}")
        stage = "workers"
        started = time.monotonic()
        await pool.start()
        await try_grammars(registry, pool.analyse, schema_limits(settings))
        _passed(
            stage,
            f"{settings.compile_workers} for grammars, started in {time.monotonic() - started:.1f} s",
        )
        stage = "model"
        for engine in engines:
            stage = "model"
            await _load(engine)
            stage = "warm-up"
            await _warm_up(engine)
    except (ServiceError, ValueError, OSError, ImportError) as error:
        text = error.message if isinstance(error, ServiceError) else str(error)
        stage = "tasks" if isinstance(error, TaskSourceError) else stage
        fix = REINSTALL if isinstance(error, ImportError) else FIX[stage]
        first, *more = text.splitlines()
        typer.echo(f"{stage:<10}FAILED: {with_flag(first)}", err=True)
        for line in [*more, fix.format(model=settings.model, remedy=REMEDY[settings.engine])]:
            if line:
                typer.echo(f"{'':<10}{line}", err=True)
        return FAILED
    finally:
        if runtime is not None:
            await runtime.stop(0)
    typer.echo("All checks passed. Start the server with the same settings: qwen3vl serve")
    return 0


async def _load(engine: Engine) -> None:
    started = time.monotonic()
    await engine.start()
    found = engine.capabilities
    context = f"{found.context_length} tokens" if found.context_length else "unknown"
    _passed(
        "model",
        f"{found.model} on the {found.engine} engine, context {context},"
        f" loaded in {time.monotonic() - started:.1f} s",
    )
    for key, value in sorted(found.details.items()):
        typer.echo(f"{'':<14}{key} {value}")


async def _warm_up(engine: Engine) -> None:
    """Run one choice, or a JSON schema where the engine takes nothing else; with a small grey image
    if the model accepts images."""
    started = time.monotonic()
    found = engine.capabilities
    grammar = Grammar(GrammarKind.CHOICE, '["yes", "no"]')
    if grammar.kind not in found.grammar_kinds:
        grammar = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "boolean"}')
    vision = Modality.IMAGE in found.modalities
    grey = Image(np.full((64, 64, 3), 128, np.uint8))
    request = GenerateRequest(
        "check",
        "Say yes or no.",
        images=(grey,) if vision else (),
        grammar=analyse(grammar, DEFAULT_LIMITS).grammar,
        sampling=Sampling(max_tokens=8),
    )
    last = await _last(engine.generate(request))
    image = " about an image" if vision else ""
    _passed(
        "warm-up",
        f"{last.usage.output_tokens} constrained tokens{image}"
        f" in {time.monotonic() - started:.2f} s",
    )


async def _last(chunks: AsyncIterator[Chunk]) -> Chunk:
    last = Chunk("")
    async for chunk in chunks:
        last = chunk
    return last


def _passed(stage: str, text: str) -> None:
    typer.echo(f"{stage:<10}ok  {text}")


def _security(settings: Settings) -> str:
    transport = "TLS" if settings.tls else "no TLS"
    callers = "callers need a key or a certificate" if settings.authenticated else "no API keys"
    reach = "this machine only" if settings.loopback else "reachable from other machines"
    return f"{transport}, {callers}, {reach}"
