"""Resizes the images of a request and cuts them into patches, as the checkpoint's processor
does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmdeploy_ext.encoder.preprocess import (
    ImageProcessorConfig,
    preprocess,
    preprocess_bytes,
)
from lmdeploy_ext.encoder.sizes import smart_resize
from lmdeploy_ext.packing import PackedImage
from service.engines.common.reducing import reduce_all
from service.errors import ImageError
from service.types import ImageRows, ImageSource


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
        try:
            rows, columns = self._resized(image)
        except ValueError as error:
            raise ImageError(f"images[{index}].data", str(error)) from None
        return rows * columns // self._config.factor**2

    async def pack(self, images: Sequence[ImageSource]) -> list[PackedImage]:
        """The patches of all images of a request, in order.

        Raises ImageError for an image that cannot be used.
        """
        return await reduce_all(images, self._reduce, self._needs_bytes)

    def _reduce(self, index: int, image: ImageSource, rows: ImageRows) -> PackedImage:
        try:
            return preprocess(rows, self._config, *self._bounds(image))
        except ValueError as error:
            raise ImageError(f"images[{index}].data", str(error)) from None

    def _needs_bytes(self, image: ImageSource) -> int:
        try:
            resized = self._resized(image)
        except ValueError:
            return 0  # its reduction raises the same error
        return preprocess_bytes((image.height, image.width), resized)

    def _resized(self, image: ImageSource) -> tuple[int, int]:
        """Height and width after resizing. Raises ``ValueError``."""
        config = self._config
        low, high = self._bounds(image)
        low = config.min_pixels if low is None else low
        high = config.max_pixels if high is None else high
        return smart_resize(image.height, image.width, config.factor, low, high)

    def _bounds(self, image: ImageSource) -> tuple[int | None, int | None]:
        """The request's bounds; a maximum below the model's minimum lowers the minimum, too."""
        low, high = image.min_pixels, image.max_pixels
        if self._most_pixels is not None:
            high = min(self._config.max_pixels if high is None else high, self._most_pixels)
            low = None if low is None else min(low, high)
        if low is None and high is not None:
            low = min(self._config.min_pixels, high)
        return low, high
