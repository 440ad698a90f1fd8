"""The records that make LMDeploy run Qwen3-VL checkpoints on TurboMind."""

from __future__ import annotations

from typing import Any

from lmdeploy_ext import host
from lmdeploy_ext.patch import Entry, Patch, Record

MODEL = "qwen3_vl"
"""Name of the source model in ``INPUT_MODELS``."""

UPSTREAM = "LMDeploy supports Qwen3-VL on TurboMind (issues 4122, 4187, 4553)"


class _OnlyOwnClass:
    """A class attribute that subclasses do not inherit: they keep the previous value."""

    def __init__(self, value: object, inherited: object) -> None:
        self.value = value
        self.inherited = inherited

    def __get__(self, instance: object, owner: type) -> object:
        return self.value if self in vars(owner).values() else self.inherited


def _native_vision(original: Any) -> Any:
    return _OnlyOwnClass(True, original)


def _source_model() -> Any:
    from lmdeploy_ext.turbomind.model import Qwen3VLSourceModel

    return Qwen3VLSourceModel


def _architecture(name: str) -> Entry:
    return Entry(
        name=f"architecture {name}",
        target=host.SUPPORTED_ARCHS,
        key=name,
        value=lambda: MODEL,
        why="Without it the automatic choice of the engine falls back to the PyTorch engine.",
        remove_when=UPSTREAM,
    )


RECORDS: tuple[Record, ...] = (
    Entry(
        name="source model",
        target=host.INPUT_MODELS,
        key=MODEL,
        value=_source_model,
        why="TurboMind has no class that reads a Qwen3-VL checkpoint.",
        remove_when=UPSTREAM,
    ),
    Patch(
        name="native vision",
        target=host.NATIVE_VISION,
        why="The front end would run the encoder of transformers in Python and pass embeddings; "
        "subclasses (Qwen3.5, InternS1-Pro) keep what they had.",
        remove_when=UPSTREAM,
        replace=_native_vision,
    ),
    *(_architecture(name) for name in host.ARCHITECTURES),
)
