"""Pictures on their way into a prompt: patches first, features of the vision tower second.

Each picture is encoded by itself, so that its features depend on nothing but the picture, whatever
arrives at the same time; that is also what makes remembering them exact.

Letters: M image tokens; D hidden size of the decoder.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig, preprocess, smart_resize
from service.errors import ImageError
from service.types import Image

if TYPE_CHECKING:
    from lmdeploy_ext.encoder import VisionEncoder
    from lmdeploy_ext.packing import PackedImage


class ImagePreprocessor:
    """Resizes pictures and cuts them into patches. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._config = ImageProcessorConfig.from_checkpoint(folder)

    def num_tokens(self, index: int, image: Image) -> int:
        """What a picture will take of the context, without touching its pixels.

        Raises ImageError for a picture that cannot be used; ``index`` is its place.
        """
        config = self._config
        low, high = self._bounds(image)
        low = config.min_pixels if low is None else low
        high = config.max_pixels if high is None else high
        height, width, _ = image.pixels.shape
        try:
            sides = smart_resize(height, width, config.factor, low, high)
        except ValueError as error:
            raise ImageError(f"images[{index}].data", str(error)) from None
        return sides[0] * sides[1] // config.factor**2

    def __call__(self, index: int, image: Image) -> PackedImage:
        """Raises ImageError for a picture that cannot be used; ``index`` is its place."""
        try:
            return preprocess(image.pixels, self._config, *self._bounds(image))
        except ValueError as error:
            raise ImageError(f"images[{index}].data", str(error)) from None

    def _bounds(self, image: Image) -> tuple[int | None, int | None]:
        """The request's bounds; one below the model's own least area takes that along."""
        low, high = image.min_pixels, image.max_pixels
        if low is None and high is not None:
            low = min(self._config.min_pixels, high)
        return low, high


class FeatureSource:
    """The vision tower with a memory of the pictures that it saw last. Used by one thread."""

    def __init__(self, encoder: VisionEncoder, cache_bytes: int, deepstack: bool = True) -> None:
        """deepstack: False leaves its features away, to see what they are worth."""
        self._encoder = encoder
        self.deepstack = deepstack
        self._limit = cache_bytes
        self._known: OrderedDict[bytes, tuple[Tensor, ...]] = OrderedDict()
        self._size = 0

    def features(self, images: Sequence[PackedImage]) -> tuple[Tensor, ...]:
        """Embeddings and then DeepStack features, each (M, D), of all pictures in order."""
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
