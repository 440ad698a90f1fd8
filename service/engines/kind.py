"""The description of an engine before it is built: its name, its settings and its build
function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field

from service.engine import Engine
from service.engines.common.loops import LoopGuard

MIB = 1024 * 1024
DTYPE = (
    "Type of the weights; auto is the type of the checkpoint, but float32 on the reference engine "
    "for a model of at most 1 GiB on a CPU without bfloat16 instructions (AMX, AVX512-BF16)."
)
MAX_BATCH = "Maximum number of requests decoded together."
GRAMMAR_CACHE = "Maximum number of bytes of compiled grammars that the engine keeps."
CONTEXT_LENGTH = "Maximum number of tokens of prompt and answer; unset: the limit of the model."
VISION = (
    "Accept images. With --no-vision the vision tower is not loaded, its memory is free for more "
    "requests, and a request with an image is refused."
)


class EngineSettings(BaseModel):
    """The settings of an engine; each engine has a subclass.

    Every field becomes a flag of ``qwen3vl serve`` and an environment variable. Engines with the
    same field share one flag, with the default and the range of the chosen engine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vision: bool = Field(True, description=VISION)

    passed_on: ClassVar[frozenset[str]] = frozenset()
    """Names of settings of other engines that this engine passes on to them."""

    @property
    def rows(self) -> int | None:
        """Maximum number of requests decoded together; None where the engine does not say."""
        return getattr(self, "max_batch", None)

    @property
    def gpus(self) -> float:
        """Number of GPUs that the engine takes."""
        return 0

    @classmethod
    def why_not(cls, name: str) -> str | None:
        """An explanation why this engine does not have a setting of another engine; None if there
        is none."""
        return None


class EngineArguments(EngineSettings):
    """Constructor arguments of an engine in addition to its settings; each engine documents its
    own."""

    model: str | Path
    revision: str | None = None
    max_queue: int = Field(1024, ge=1)
    max_images: int = Field(16, ge=1)
    grammar_threads: int = Field(2, ge=1)
    stall_s: float = 120.0
    loop_guard: LoopGuard = Field(default_factory=LoopGuard)

    def __init__(self, model: str | Path, **options: Any) -> None:
        super().__init__(**{"model": model, **options})


class Build(Protocol):
    """The function that builds an engine, which is not started yet."""

    def __call__(
        self,
        model: str | Path,
        settings: Any,
        *,
        revision: str | None,
        max_images: int,
        on_progress: Callable[[str], None] | None,
    ) -> Engine:
        """model: a folder, or a name on the hub.
        settings: an instance of the engine's settings class."""
        ...


class BuildSeveral(Protocol):
    """The function that builds an engine for each model that the settings name."""

    def __call__(
        self,
        model: str | Path,
        settings: Any,
        *,
        revision: str | None,
        max_images: int,
        on_progress: Callable[[str], None] | None,
    ) -> Sequence[Engine]:
        """As `Build`. The first engine answers calls that name no model."""
        ...


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One engine of the registry.

    Attributes:
        name: value of the setting ``engine``.
        settings: class of its settings.
        build: makes the engine; imports what is heavy when it is called. Of a kind whose settings
            name one model.
        several: makes the engines of a kind whose settings may name several models, in place of
            ``build``.
        offered: whether help and errors name the engine; False for engines that only tests use.
    """

    name: str
    settings: type[EngineSettings]
    build: Build | None = None
    several: BuildSeveral | None = None
    offered: bool = True

    def engines(
        self, model: str | Path, settings: EngineSettings, **options: Any
    ) -> Sequence[Engine]:
        """The engines that the settings name; see `BuildSeveral`."""
        if self.several is not None:
            return self.several(model, settings, **options)
        assert self.build is not None
        return [self.build(model, settings, **options)]
