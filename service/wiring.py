"""Builds the parts of a server from its settings: the only place that picks an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.engine import Engine
from service.inference import schema_limits
from service.settings import Settings, SettingsError
from service.tasks.grammars.pool import GrammarPool
from service.tasks.registry import Registry, load_registry

BUNDLED_MODEL = Path(__file__).parent / "bundled" / "drawings"
"""A small Qwen3-VL that describes drawings; its README.md is the model card."""
REFERENCE_BATCH, LMDEPLOY_BATCH = 16, 64
"""Requests decoded together where the operator says nothing."""


def build_engine(settings: Settings, on_progress: Callable[[str], None] | None = None) -> Engine:
    """The engine that the settings name, not started yet.

    on_progress: told in a few words what is being loaded; may be called from another thread.
    """
    if settings.engine == "fake":
        from service.engines.fake import FakeEngine

        return FakeEngine(vision=settings.vision)
    if settings.engine == "lmdeploy":
        return _lmdeploy(settings, on_progress)
    from service.engines.reference import ReferenceEngine

    return ReferenceEngine(
        _model(settings),
        revision=settings.revision,
        on_progress=on_progress,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
        max_batch=settings.max_batch or REFERENCE_BATCH,
        context_length=settings.context_length,
        max_images=settings.max_images,
        vision=settings.vision,
        **_cache(settings),
    )


def build_pool(settings: Settings) -> GrammarPool:
    """The processes that analyse grammars of callers, not started yet."""
    return GrammarPool(settings.compile_workers, settings.compile_timeout_s)


def _cache(settings: Settings) -> dict[str, Any]:
    """The bound of the engine's cache; its own where the operator says nothing."""
    limit = settings.grammar_cache_bytes
    return {} if limit is None else {"grammar_cache_bytes": limit}


def _model(settings: Settings) -> str | Path:
    return BUNDLED_MODEL if settings.model == "bundled" else settings.model


def _lmdeploy(settings: Settings, on_progress: Callable[[str], None] | None) -> Engine:
    """Raises SettingsError for what the chosen backend cannot do."""
    from service.engines.lmdeploy import LMDeployEngine

    try:
        return LMDeployEngine(
            _model(settings),
            revision=settings.revision,
            on_progress=on_progress,
            backend=settings.backend,
            deepstack=settings.deepstack,
            vision=settings.vision,
            dtype=settings.dtype,
            model_format=settings.model_format,
            tensor_parallel=settings.tensor_parallel,
            context_length=settings.context_length,
            max_batch=settings.max_batch or LMDEPLOY_BATCH,
            cache_share=settings.cache_share,
            cache_type=settings.cache_type,
            prefix_caching=settings.prefix_caching,
            prefill_chunk=settings.prefill_chunk,
            max_images=settings.max_images,
            picture_pixels=settings.picture_pixels,
            vision_batch=settings.vision_batch,
            **_cache(settings),
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None


def build_registry(settings: Settings) -> Registry:
    """The built-in tasks, those of installed packages and those of the operator's folder."""
    return load_registry(settings.tasks_dir, schema_limits(settings))
