"""Builds the parts of a server from its settings: the only place that picks an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lmdeploy_ext.images.files import ImageLimits
from service.engine import Engine
from service.engines.registry import ENGINES
from service.errors import ImageError
from service.inference.budgets import image_limits
from service.inference.images import check_header
from service.inference.pipeline import schema_limits
from service.settings import Settings
from service.structured_output.pool import GrammarPool
from service.tasks.registry import Registry, TaskSourceError, load_registry
from service.types import PropertyOrder

BUNDLED_MODEL = Path(__file__).parent / "bundled" / "drawings"
"""A small Qwen3-VL that describes drawings; its README.md is the model card."""


def build_engine(settings: Settings, on_progress: Callable[[str], None] | None = None) -> Engine:
    """The engine of calls that name no model, not started yet; see `build_engines`."""
    return build_engines(settings, on_progress)[0]


def build_engines(
    settings: Settings, on_progress: Callable[[str], None] | None = None
) -> Sequence[Engine]:
    """The engines that the settings name, one for each model, not started yet.

    on_progress: called with a short text about the current step of loading; may be called from
    another thread.
    """
    kind = ENGINES[settings.engine]
    model = BUNDLED_MODEL if settings.model == "bundled" else settings.model
    return kind.engines(
        model,
        settings.engine_settings,
        revision=settings.revision,
        max_images=settings.max_images,
        on_progress=on_progress,
    )


def build_pool(settings: Settings) -> GrammarPool:
    """The pool of grammar workers, not started yet."""
    return GrammarPool(settings.compile_workers, settings.compile_timeout_s)


def build_registry(settings: Settings) -> Registry:
    """The built-in tasks, those of installed packages and those of the operator's folder."""
    order = PropertyOrder(settings.property_order)
    limits, closes = schema_limits(settings), settings.close_objects
    registry = load_registry(settings.tasks_dir, limits, order, closes)
    check_examples(registry, image_limits(settings))
    return registry


def check_examples(registry: Registry, limits: ImageLimits) -> None:
    """Raises one ``TaskSourceError`` for all images of examples that the server would refuse."""
    problems = []
    for task in registry.list():
        for image in task.example_images:
            try:
                check_header(image.data, image.field, limits)
            except ImageError as error:
                problems.append(f"  {task.name}: {error.message}")
    if problems:
        raise TaskSourceError("Tasks cannot be loaded:\n" + "\n".join(problems))
