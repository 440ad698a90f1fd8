"""Faults that an engine for Qwen3-VL may have, put into the reference engine on purpose.

Each feature stream of the drawings model carries attributes of its own, and where things are it
knows from tokens and positions alone. So these faults show as wrong answers and not as a slightly
worse text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmdeploy_ext.packing import PackedImage
from service.engines.reference import ReferenceEngine

Features = tuple[Tensor, ...]
"""Embeddings, then the DeepStack features."""


def _without(index: int) -> Callable[[Features], Features]:
    def change(features: Features) -> Features:
        kept = list(features)
        kept[index + 1] = torch.zeros_like(kept[index + 1])
        return tuple(kept)

    return change


def _late(features: Features) -> Features:
    embeddings, *deepstack = features
    return (embeddings, torch.zeros_like(embeddings), *deepstack)


@dataclass(frozen=True)
class Fault:
    """What is wrong, and how the features or the mRoPE positions (3, L) of a prompt are changed."""

    meaning: str
    features: Callable[[Features], Features] | None = None
    positions: Callable[[Tensor], Tensor] | None = None


FAULTS = {
    "deepstack-dropped": Fault("no DeepStack features", lambda streams: streams[:1]),
    "feature-0-dropped": Fault("the first DeepStack feature is zero", _without(0)),
    "feature-1-dropped": Fault("the second DeepStack feature is zero", _without(1)),
    "feature-2-dropped": Fault("the third DeepStack feature is zero", _without(2)),
    "features-reversed": Fault(
        "DeepStack features in reverse order", lambda streams: (streams[0], *streams[:0:-1])
    ),
    "features-late": Fault("each DeepStack feature one layer late", _late),
    "tokens-shifted": Fault(
        "image features one token late",
        lambda streams: tuple(stream.roll(1, 0) for stream in streams),
    ),
    "positions-swapped": Fault(
        "height and width of mRoPE swapped", positions=lambda positions: positions[[0, 2, 1]]
    ),
    "positions-flat": Fault(
        "all tokens of an image at one position", positions=lambda positions: positions[[0, 0, 0]]
    ),
}
"""By name."""


class _Broken:
    """Stands in the place of `FeatureSource`."""

    def __init__(self, sound: Any, change: Callable[[Features], Features]) -> None:
        self._sound, self._change = sound, change
        self.deepstack = True

    def features(self, images: Sequence[PackedImage]) -> Features:
        return self._change(self._sound.features(images))


def inject(engine: ReferenceEngine, name: str) -> None:
    """Break a started engine. KeyError: no such fault."""
    fault = FAULTS[name]
    model: Any = engine._model
    if fault.features:
        model.vision = _Broken(model.vision, fault.features)
    if fault.positions:
        change, sound = fault.positions, model.rotary.for_prompt
        model.rotary.for_prompt = lambda positions: sound(change(positions))
