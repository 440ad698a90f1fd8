"""The engines that a server can run. To add an engine, add a package and one line here."""

from __future__ import annotations

from pydantic.fields import FieldInfo

from service.engines import fake, lmdeploy, ray, reference, remote
from service.engines.kind import EngineKind

RUN_HERE = (reference.KIND, lmdeploy.KIND, fake.KIND)
"""Engines that compute on the machine that starts them, also in a replica of the Ray engine."""
ENGINES: dict[str, EngineKind] = {
    kind.name: kind
    for kind in (reference.KIND, lmdeploy.KIND, remote.KIND, ray.kind_over(RUN_HERE), fake.KIND)
}


def offered_engines() -> list[str]:
    """Names of the engines that users can choose, in the order of the registry."""
    return [kind.name for kind in ENGINES.values() if kind.offered]


def engine_fields() -> dict[str, list[tuple[EngineKind, FieldInfo]]]:
    """Every setting of any engine -> the engines that have this setting as their own."""
    found: dict[str, list[tuple[EngineKind, FieldInfo]]] = {}
    for kind in ENGINES.values():
        for name, field in kind.settings.model_fields.items():
            if name not in kind.settings.passed_on:
                found.setdefault(name, []).append((kind, field))
    return found
