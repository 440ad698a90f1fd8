"""Builds the Ray engine from its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from service.engines.kind import EngineKind
from service.engines.ray.cluster import ClusterOptions
from service.engines.ray.engine import RayEngine
from service.engines.ray.options import RaySettings, settings_over
from service.engines.ray.plan import InnerEngine, Plan, Scale, portable


def kind_over(kinds: Sequence[EngineKind]) -> EngineKind:
    """The Ray engine, whose replicas can run these engines."""
    return EngineKind("ray", settings_over(kinds), build)


def build(
    model: str | Path,
    settings: RaySettings,
    *,
    revision: str | None,
    max_images: int,
    on_progress: Callable[[str], None] | None,
) -> RayEngine:
    """Build the engine for the registry; see `service.engines.kind.Build`."""
    inner = settings.inner_settings()
    scale = Scale(
        replicas=settings.ray_replicas,
        max_replicas=settings.ray_max_replicas,
        gpus=settings.gpus,
        cpus=settings.ray_cpus,
        ongoing=settings.ongoing,
        target_ongoing=settings.target_ongoing,
        text_delay_s=settings.ray_text_delay_s,
    )
    assert settings.inner_kind.build is not None, "an inner engine has one model"
    sent = portable(model)
    agreed = {name: str(value) for name, value in inner.model_dump(mode="json").items()}
    agreed |= {
        "ray_engine": settings.ray_engine,
        "model": str(getattr(sent, "relative", sent)),
        "revision": str(revision),
        "max_images": str(max_images),
    }
    plan = Plan(
        name=settings.ray_name,
        build=InnerEngine(settings.inner_kind.build, sent, inner, revision, max_images),
        scale=scale,
        settings=agreed,
        linger_s=settings.ray_linger_s,
    )
    cluster = ClusterOptions(
        address=settings.ray_address,
        store_bytes=settings.ray_store_bytes,
        cpus=scale.cpus * scale.most,
    )
    return RayEngine(plan, cluster, start_s=settings.ray_start_s, on_progress=on_progress)
