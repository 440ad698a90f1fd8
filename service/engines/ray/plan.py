"""What is deployed: how a replica builds its engine, and how Ray runs the replicas.

These values travel to other processes and machines, which have the same version of this package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from service import __version__
from service.engine import Engine
from service.engines.kind import Build, EngineSettings

PACKAGE = Path(__file__).parents[2]
"""The folder of the service, which may be another one on another machine."""


@dataclass(frozen=True)
class BundledPath:
    """A path below the folder of the service, on whichever machine."""

    relative: str

    def here(self) -> Path:
        return PACKAGE / self.relative


@dataclass(frozen=True)
class InnerEngine:
    """Builds the engine of a replica."""

    build: Build
    model: str | Path | BundledPath
    settings: EngineSettings
    revision: str | None
    max_images: int

    def __call__(self) -> Engine:
        model = self.model.here() if isinstance(self.model, BundledPath) else self.model
        return self.build(
            model,
            self.settings,
            revision=self.revision,
            max_images=self.max_images,
            on_progress=None,
        )


@dataclass(frozen=True)
class Scale:
    """How Ray runs the replicas.

    max_replicas: None always runs ``replicas``. gpus, cpus: of each replica. ongoing: maximum
    number of requests on a replica at the same time. target_ongoing: number of them that Ray aims at
    when it scales. text_delay_s: maximum time for which a replica collects text.
    """

    replicas: int = 1
    max_replicas: int | None = None
    gpus: float = 0.0
    cpus: float = 1.0
    ongoing: int = 64
    target_ongoing: float = 42.0
    text_delay_s: float = 0.02

    @property
    def most(self) -> int:
        """Maximum number of replicas."""
        return self.max_replicas or self.replicas


@dataclass(frozen=True)
class Plan:
    """One deployment.

    name: of the deployment in the cluster. build: makes the engine of a replica. settings: what the
    engines of all servers that share the deployment must agree on, by the name of the setting.
    linger_s: time for which the replicas stay without a server.
    """

    name: str
    build: Callable[[], Engine]
    scale: Scale
    settings: Mapping[str, str]
    linger_s: float = 60.0

    @property
    def agreed(self) -> dict[str, str]:
        """Everything that servers with this deployment must agree on."""
        scale = {
            f"ray_{name}": str(value) for name, value in dataclasses.asdict(self.scale).items()
        }
        return {"version": __version__, **self.settings, **scale}

    def differences(self, other: Plan) -> str:
        """The settings in which another plan differs, for people; empty where there are none."""
        ours, theirs = self.agreed, other.agreed
        return ", ".join(
            f"{name} (running: {ours.get(name, 'unset')}, here: {theirs.get(name, 'unset')})"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        )


def portable(model: str | Path) -> str | Path | BundledPath:
    """The model as a value that other machines understand, too."""
    path = Path(model).absolute()
    if path.is_relative_to(PACKAGE):
        return BundledPath(str(path.relative_to(PACKAGE)))
    return str(path) if path.exists() else model
