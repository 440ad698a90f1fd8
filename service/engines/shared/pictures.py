"""Pictures of a request cut into patches, by the rules of the checkpoint."""

from __future__ import annotations

from pathlib import Path

from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig, preprocess, smart_resize
from lmdeploy_ext.packing import PackedImage
from service.errors import ImageError
from service.types import Image


class ImagePreprocessor:
    """Resizes pictures and cuts them into patches. Thread-safe."""

    def __init__(self, folder: Path, most_pixels: int | None = None) -> None:
        """most_pixels: of a resized picture, whatever the checkpoint and a request allow."""
        self._config = ImageProcessorConfig.from_checkpoint(folder)
        self._most_pixels = most_pixels

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
        if self._most_pixels is not None:
            high = min(self._config.max_pixels if high is None else high, self._most_pixels)
            low = None if low is None else min(low, high)
        if low is None and high is not None:
            low = min(self._config.min_pixels, high)
        return low, high
