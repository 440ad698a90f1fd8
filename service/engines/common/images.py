"""Resizes the images of a request and cuts them into patches, as the checkpoint's processor
does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig, preprocess, smart_resize
from lmdeploy_ext.packing import PackedImage
from service.engines.common.reducing import reduce_all
from service.errors import ImageError
from service.types import ImageSource

if TYPE_CHECKING:
    from service.types import Pixels


class ImagePreprocessor:
    """Resizes images and cuts them into patches. Thread-safe."""

    def __init__(self, folder: Path, most_pixels: int | None = None) -> None:
        """most_pixels: maximum area of a resized image, in pixels, even if the checkpoint and the
        request allow more."""
        self._config = ImageProcessorConfig.from_checkpoint(folder)
        self._most_pixels = most_pixels

    def num_tokens(self, index: int, image: ImageSource) -> int:
        """The number of tokens of an image, computed without decoding it.

        Raises ImageError for an image that cannot be used. index: position of the image in the
        request.
        """
        config = self._config
        low, high = self._bounds(image)
        low = config.min_pixels if low is None else low
        high = config.max_pixels if high is None else high
        try:
            sides = smart_resize(image.height, image.width, config.factor, low, high)
        except ValueError as error:
            raise ImageError(f"images[{index}].data", str(error)) from None
        return sides[0] * sides[1] // config.factor**2

    async def pack(self, images: Sequence[ImageSource]) -> list[PackedImage]:
        """The patches of all images of a request, in order.

        Raises ImageError for an image that cannot be used.
        """
        return await reduce_all(images, self._reduce)

    def _reduce(self, index: int, image: ImageSource, pixels: Pixels) -> PackedImage:
        try:
            return preprocess(pixels, self._config, *self._bounds(image))
        except ValueError as error:
            raise ImageError(f"images[{index}].data", str(error)) from None

    def _bounds(self, image: ImageSource) -> tuple[int | None, int | None]:
        """The request's bounds; a maximum below the model's minimum lowers the minimum, too."""
        low, high = image.min_pixels, image.max_pixels
        if self._most_pixels is not None:
            high = min(self._config.max_pixels if high is None else high, self._most_pixels)
            low = None if low is None else min(low, high)
        if low is None and high is not None:
            low = min(self._config.min_pixels, high)
        return low, high
