"""Faults that an engine for Qwen3-VL may have, put into the reference engine on purpose.

Each feature stream of the drawings model carries attributes of its own, so these faults show as
wrong answers and not as a slightly worse text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


_FEATURES: dict[str, Callable[[Features], Features]] = {
    "deepstack-dropped": lambda features: features[:1],
    "feature-0-dropped": _without(0),
    "feature-1-dropped": _without(1),
    "feature-2-dropped": _without(2),
    "features-reversed": lambda features: (features[0], *features[:0:-1]),
    "features-late": _late,
    "tokens-shifted": lambda features: tuple(stream.roll(1, 0) for stream in features),
}
_POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "positions-swapped": lambda positions: positions[[0, 2, 1]],
    "positions-flat": lambda positions: positions[[0, 0, 0]],
}
FAULTS = {
    "deepstack-dropped": "no DeepStack features",
    "feature-0-dropped": "the first DeepStack feature is zero",
    "feature-1-dropped": "the second DeepStack feature is zero",
    "feature-2-dropped": "the third DeepStack feature is zero",
    "features-reversed": "DeepStack features in reverse order",
    "features-late": "each DeepStack feature one layer late",
    "tokens-shifted": "image features one token late",
    "positions-swapped": "height and width of mRoPE swapped",
    "positions-flat": "all tokens of a picture at one position",
}
"""Name -> what is wrong."""


class _Broken:
    """Stands in the place of `FeatureSource`."""

    def __init__(self, sound: Any, change: Callable[[Features], Features]) -> None:
        self._sound, self._change = sound, change
        self.deepstack = True

    def features(self, images: Sequence[PackedImage]) -> Features:
        return self._change(self._sound.features(images))


def inject(engine: ReferenceEngine, fault: str) -> None:
    """Break a started engine. KeyError: no such fault."""
    model: Any = engine._model
    if fault in _FEATURES:
        model.vision = _Broken(model.vision, _FEATURES[fault])
        return
    change, sound = _POSITIONS[fault], model.rotary.for_prompt
    model.rotary.for_prompt = lambda positions: sound(change(positions))
