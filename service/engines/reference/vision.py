"""Computes the features of the images of a prompt.

Each image is encoded separately, so that its features depend on the image alone and not on other
requests. Cached features are therefore exact.

Letters: M image tokens; D hidden size of the decoder.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lmdeploy_ext.encoder import VisionEncoder
    from lmdeploy_ext.packing import PackedImage


class FeatureSource:
    """The vision tower with a cache of recent images. Used by one thread."""

    def __init__(self, encoder: VisionEncoder, cache_bytes: int, deepstack: bool = True) -> None:
        """deepstack: False leaves the DeepStack features out, to measure their effect."""
        self._encoder = encoder
        self.deepstack = deepstack
        self._limit = cache_bytes
        self._known: OrderedDict[bytes, tuple[Tensor, ...]] = OrderedDict()
        self._size = 0

    def features(self, images: Sequence[PackedImage]) -> tuple[Tensor, ...]:
        """The embeddings, followed by the DeepStack features, of all images in order; each (M,
        D)."""
        with torch.inference_mode():
            each = [self._of(image) for image in images]
            return tuple(torch.cat(streams) for streams in zip(*each, strict=True))

    def _of(self, image: PackedImage) -> tuple[Tensor, ...]:
        key = hashlib.blake2b(image.patches.tobytes(), digest_size=32)
        key.update(repr((image.grid, image.patches.shape)).encode())
        name = key.digest()
        if name in self._known:
            self._known.move_to_end(name)
            return self._known[name]
        encoded = self._encoder.encode([image])
        deepstack = encoded.deepstack if self.deepstack else ()
        features = (encoded.embeddings, *deepstack)
        size = _bytes(features)
        if size <= self._limit:
            self._known[name] = features
            self._size += size
        while self._size > self._limit:
            self._size -= _bytes(self._known.popitem(last=False)[1])
        return features


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
