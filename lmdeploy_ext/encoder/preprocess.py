"""Converts pixels to patches with the smart resize, bicubic resampling and patch order of Qwen3-VL.

The patches are uint8. transformers also rounds the resized image to uint8 before it normalises, so
uint8 patches of one frame have exactly the same information as transformers' float32
``pixel_values``, which contain a still image as two frames: 768 bytes instead of 6144 per patch.
`normalise` computes ``pixel_values``.

Letters: H, W the image in pixels; h, w its grid in patches; P = h*w patches; C = 3 channels;
p pixels per patch side; m patches per merged side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lmdeploy_ext.encoder.sizes import smart_resize
from lmdeploy_ext.packing import PackedImage

BICUBIC = 3  # Pillow's number, used in the configuration files
CHANNELS = 3
_CHUNK = 128  # number of patches; one chunk of normalise fits into the second-level cache
STRIP_PIXELS = 1 << 18  # minimum size of an image that is resized in strips


class ImageRows(Protocol):
    """An RGB image of shape (H, W, 3) and dtype uint8 that returns its rows on demand.

    ``rows[top:bottom]`` is an array of these rows. A numpy array has this interface; a decoder may
    produce rows on demand, so that a large image exists in memory only once.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, rows: slice, /) -> npt.NDArray[np.uint8]: ...


@dataclass(frozen=True, slots=True)
class ImageProcessorConfig:
    """The pre-processing parameters of a checkpoint.

    Attributes:
        min_pixels, max_pixels: limits of height * width after resizing.
        patch_size: pixels per patch side.
        temporal_patch_size: frames per patch.
        merge_size: patches per side that become one token.
        mean, std: per channel, on values scaled to 0..1.
    """

    min_pixels: int = 65536
    max_pixels: int = 16777216
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"need 0 < min_pixels <= max_pixels, got {self.min_pixels} and {self.max_pixels}"
            )
        if min(self.patch_size, self.temporal_patch_size, self.merge_size) < 1:
            raise ValueError("patch_size, temporal_patch_size and merge_size must be at least 1")
        if len(self.mean) != CHANNELS or len(self.std) != CHANNELS or min(self.std) <= 0:
            raise ValueError("mean and std need three channels, and std must be positive")

    @property
    def factor(self) -> int:
        """Pixels per side of one merged token; both sides of a resized image are multiples of
        it."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> ImageProcessorConfig:
        """Read the content of preprocessor_config.json, in either of its formats.

        Raises:
            ValueError: the file has another resampling or scale than Qwen3-VL's.
        """
        for switch in ("do_resize", "do_rescale", "do_normalize"):
            if not settings.get(switch, True):
                raise ValueError(f"{switch}=false is not supported")
        if settings.get("resample", BICUBIC) not in (BICUBIC, None):
            raise ValueError(f"resample must be {BICUBIC} (bicubic), got {settings['resample']}")
        if not math.isclose(settings.get("rescale_factor") or 1 / 255, 1 / 255, rel_tol=1e-6):
            raise ValueError(f"rescale_factor must be 1/255, got {settings['rescale_factor']}")
        size = settings.get("size") or {}
        sources = {
            "min_pixels": (settings.get("min_pixels"), size.get("shortest_edge")),
            "max_pixels": (settings.get("max_pixels"), size.get("longest_edge")),
            "patch_size": (settings.get("patch_size"),),
            "temporal_patch_size": (settings.get("temporal_patch_size"),),
            "merge_size": (settings.get("merge_size"),),
        }
        values: dict[str, Any] = {}
        for name, candidates in sources.items():
            given = [value for value in candidates if value is not None]
            if given:
                values[name] = int(given[0])
        for name, key in (("mean", "image_mean"), ("std", "image_std")):
            if settings.get(key) is not None:
                values[name] = tuple(float(value) for value in settings[key])
        return cls(**values)

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> ImageProcessorConfig:
        """Read preprocessor_config.json, or processor_config.json, which transformers 5 writes.

        Raises:
            FileNotFoundError: the folder has neither file.
            ValueError: see `from_dict`.
        """
        legacy = Path(folder) / "preprocessor_config.json"
        if legacy.is_file():
            return cls.from_dict(json.loads(legacy.read_text()))
        current = Path(folder) / "processor_config.json"
        if current.is_file():
            content = json.loads(current.read_text())
            if "image_processor" in content:
                return cls.from_dict(content["image_processor"])
        raise FileNotFoundError(
            "the checkpoint has no preprocessor_config.json and no processor_config.json "
            "with an image_processor"
        )


def preprocess(
    image: ImageRows,
    config: ImageProcessorConfig,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> PackedImage:
    """Resize one RGB image, uint8 (H, W, 3), and cut it into patches, uint8 (P, C*p*p).

    ``min_pixels`` and ``max_pixels`` override the configuration for this image.

    Raises:
        ValueError: not a uint8 RGB array, limits in the wrong order, or see `smart_resize`.
    """
    if image.dtype != np.uint8 or len(image.shape) != 3 or image.shape[2] != CHANNELS:
        raise ValueError(f"image must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
    low = config.min_pixels if min_pixels is None else min_pixels
    high = config.max_pixels if max_pixels is None else max_pixels
    if not 0 < low <= high:
        raise ValueError(f"need 0 < min_pixels <= max_pixels, got {low} and {high}")
    height, width = smart_resize(image.shape[0], image.shape[1], config.factor, low, high)
    planes = _resize(image, height, width)
    patches = _cut(planes, config.patch_size, config.merge_size)
    grid = (1, height // config.patch_size, width // config.patch_size)
    return PackedImage(patches, grid, config.merge_size)


def preprocess_bytes(size: tuple[int, int], resized: tuple[int, int]) -> int:
    """Maximum memory of `preprocess` in addition to the image, in bytes.

    size: (H, W) of the image; resized: (H, W) after resizing, see `smart_resize`.
    """
    narrow = size[0] * resized[1] if size[0] * size[1] > STRIP_PIXELS else 0
    strip = min(size[0] * size[1], max(STRIP_PIXELS, size[1]))
    return CHANNELS * (narrow + 2 * strip + 2 * resized[0] * resized[1])


def normalise(
    patches: npt.NDArray[np.uint8], config: ImageProcessorConfig
) -> npt.NDArray[np.float32]:
    """transformers' ``pixel_values``: float32 (P, C*2*p*p), with a still image repeated as two
    frames."""
    count, frames = len(patches), config.temporal_patch_size
    area = config.patch_size**2
    if patches.shape[1] == CHANNELS * area:
        pixels = patches.reshape(count, CHANNELS, 1, area)
    elif patches.shape[1] == CHANNELS * frames * area:
        pixels = patches.reshape(count, CHANNELS, frames, area)
    else:
        raise ValueError(f"patches {patches.shape} do not fit patch size {config.patch_size}")
    mean = np.array(config.mean, np.float32).reshape(CHANNELS, 1, 1) * np.float32(255)
    std = np.array(config.std, np.float32).reshape(CHANNELS, 1, 1) * np.float32(255)
    result = np.empty((count, CHANNELS, frames, area), np.float32)
    for start in range(0, count, _CHUNK):
        chunk = pixels[start : start + _CHUNK].astype(np.float32)
        chunk -= mean
        chunk /= std
        result[start : start + _CHUNK] = chunk
    return result.reshape(count, CHANNELS * frames * area)


def _resize(image: ImageRows, height: int, width: int) -> npt.NDArray[np.uint8]:
    """uint8 (H, W, C) to uint8 (C, height, width), bicubic with antialias, as torchvision does.

    The horizontal pass of a large image is computed in strips. In torch this pass comes first and
    rounds to uint8, so the result is equal bit by bit.
    """
    rows, columns = image.shape[:2]
    if (rows, columns) == (height, width):
        unchanged: npt.NDArray[np.uint8] = image[0:rows].transpose(2, 0, 1)
        return unchanged
    step = max(1, STRIP_PIXELS // columns)
    if rows <= step or columns == width:
        return _interpolated(image[0:rows], height, width)
    narrow = np.empty((rows, width, CHANNELS), np.uint8)
    for top in range(0, rows, step):
        strip = image[top : min(top + step, rows)]
        narrow[top : top + len(strip)] = _interpolated(strip, len(strip), width).transpose(1, 2, 0)
    return narrow.transpose(2, 0, 1) if rows == height else _interpolated(narrow, height, width)


def _interpolated(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """uint8 (H, W, C) to uint8 (C, height, width)."""
    # Pass the view without a copy: torch's uint8 kernel can read interleaved channels.
    if not image.flags.writeable or min(image.strides) < 0:
        image = image.copy()  # torch supports neither read-only tensors nor negative strides
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(image)[None].permute(0, 3, 1, 2),  # channels last, like the result
        size=(height, width),
        mode="bicubic",
        align_corners=False,
        antialias=True,
    )
    planes: npt.NDArray[np.uint8] = resized[0].numpy()
    return planes


def _cut(planes: npt.NDArray[np.uint8], p: int, m: int) -> npt.NDArray[np.uint8]:
    """uint8 (C, H, W) to uint8 (P, C*p*p); the m*m patches of a merged token are adjacent."""
    channels, height, width = planes.shape
    blocks = planes.reshape(channels, height // (p * m), m, p, width // (p * m), m, p)
    ordered = blocks.transpose(1, 4, 2, 5, 0, 3, 6)
    patches: npt.NDArray[np.uint8] = ordered.reshape(-1, channels * p * p)
    return patches
