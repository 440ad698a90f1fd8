"""Pre-processing against transformers' fast image processor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as oracle_resize

from lmdeploy_ext.encoder.preprocess import (
    ImageProcessorConfig,
    normalise,
    preprocess,
)
from lmdeploy_ext.encoder.sizes import smart_resize

IMAGES = Path(__file__).parents[4] / "shared" / "images"
CONFIG = ImageProcessorConfig(min_pixels=64 * 64, max_pixels=512 * 512)


def oracle(config: ImageProcessorConfig) -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor(
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        patch_size=config.patch_size,
        image_mean=list(config.mean),
        image_std=list(config.std),
    )


def assert_equals_oracle(image: np.ndarray, config: ImageProcessorConfig) -> None:
    packed = preprocess(image, config)
    expected = oracle(config)(images=torch.from_numpy(image).permute(2, 0, 1), return_tensors="pt")
    assert expected["image_grid_thw"].tolist() == [list(packed.grid)]
    pixels = normalise(packed.patches, config)
    assert pixels.dtype == np.float32
    assert packed.patches.flags.c_contiguous
    assert packed.patches.flags.writeable
    difference = np.abs(pixels - expected["pixel_values"].numpy())
    assert difference.max() <= 1 / 255


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 2**32 - 1))
def test_random_images(height: int, width: int, seed: int) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    rng = np.random.default_rng(seed)
    assert_equals_oracle(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample-bird.jpg", "chart2code_input.png", "ocr_example2.jpg"])
def test_real_images(name: str) -> None:
    path = IMAGES / name
    if not path.is_file():
        pytest.skip(f"no image {name}: the sample images lie beside the repository, if at all")
    with Image.open(path) as file:
        image = np.array(file.convert("RGB"))
    assert_equals_oracle(image, ImageProcessorConfig(max_pixels=1024 * 1024))


@pytest.mark.parametrize("size", [(64, 96), (320, 256)])
def test_size_that_fits_is_not_resampled(size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert_equals_oracle(image, CONFIG)
    packed = preprocess(image, CONFIG)
    np.testing.assert_array_equal(np.sort(packed.patches, axis=None), np.sort(image, axis=None))


def test_other_mean_std_and_patch_size() -> None:
    config = ImageProcessorConfig(
        min_pixels=56 * 56,
        max_pixels=300 * 300,
        patch_size=14,
        mean=(0.48, 0.45, 0.40),
        std=(0.26, 0.27, 0.3),
    )
    image = np.random.default_rng(2).integers(0, 256, (200, 333, 3), dtype=np.uint8)
    assert_equals_oracle(image, config)


def test_any_memory_layout() -> None:
    """Read-only, mirrored, cropped and column-major images give what their plain copy gives."""
    image = np.random.default_rng(3).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    frozen = image.copy()
    frozen.flags.writeable = False
    for view in (frozen, image[:, ::-1], image[::-1, 10:90], image[..., ::-1], image.T.copy().T):
        expected = preprocess(np.ascontiguousarray(view), CONFIG)
        np.testing.assert_array_equal(preprocess(view, CONFIG).patches, expected.patches)


@pytest.mark.parametrize("size", [(700, 1001), (1001, 97), (90, 1100), (480, 960), (64, 64)])
def test_strips_give_the_same_bits(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A large image is read and resized strip by strip, and never exists as a whole."""
    image = np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8)

    class Strips:
        shape, dtype, longest = image.shape, image.dtype, 0

        def __getitem__(self, rows: slice) -> np.ndarray:
            found = image[rows].copy()
            self.longest = max(self.longest, len(found))
            return found

    whole = preprocess(image, CONFIG).patches
    monkeypatch.setattr("lmdeploy_ext.encoder.preprocess.STRIP_PIXELS", 5000)
    strips = Strips()
    np.testing.assert_array_equal(preprocess(strips, CONFIG).patches, whole)
    if size[0] * size[1] > 256 * 256:
        assert strips.longest <= 5000 // size[1] + 1


def test_limits_of_one_image() -> None:
    image = np.zeros((600, 600, 3), np.uint8)
    assert preprocess(image, CONFIG, max_pixels=128 * 128).grid == (1, 8, 8)
    assert preprocess(image[:9, :9], CONFIG, min_pixels=96 * 96).grid == (1, 6, 6)
    with pytest.raises(ValueError, match="min_pixels <= max_pixels"):
        preprocess(image, CONFIG, min_pixels=9999999)


def test_frame_pair_is_not_doubled() -> None:
    pair = np.random.default_rng(4).integers(0, 256, (300, 1536), dtype=np.uint8)
    np.testing.assert_array_equal(
        normalise(pair, CONFIG), (pair.astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
    )
    with pytest.raises(ValueError, match="do not fit"):
        normalise(pair[:, :700], CONFIG)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([28, 32]))
def test_smart_resize(height: int, width: int, factor: int) -> None:
    limits = {"min_pixels": 65536, "max_pixels": 16777216}
    try:
        expected = oracle_resize(height, width, factor, **limits)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, factor, **limits)
    else:
        assert smart_resize(height, width, factor, **limits) == expected


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_refuses_what_is_not_an_image(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8|empty"):
        preprocess(image, CONFIG)


def test_config_files_of_both_styles(tmp_path: Path) -> None:
    expected = ImageProcessorConfig(min_pixels=4096, max_pixels=1048576)
    (tmp_path / "new").mkdir()
    oracle(expected).save_pretrained(tmp_path / "new")  # flat, in transformers' own words
    assert ImageProcessorConfig.from_checkpoint(tmp_path / "new") == expected

    flat = json.loads((tmp_path / "new" / "preprocessor_config.json").read_text())
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "processor_config.json").write_text(
        json.dumps({"image_processor": flat, "processor_class": "Qwen3VLProcessor"})
    )
    assert ImageProcessorConfig.from_checkpoint(tmp_path / "nested") == expected

    pixels = {**flat, "size": None, "min_pixels": 1024, "max_pixels": 2048}
    assert ImageProcessorConfig.from_dict(pixels).max_pixels == 2048


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_normalize": False}, "do_normalize"),
        ({"resample": 2}, "resample"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"min_pixels": 10, "max_pixels": 5}, "min_pixels"),
        ({"image_std": [0.5, 0.0, 0.5]}, "std"),
    ],
)
def test_unsupported_processing_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageProcessorConfig.from_dict(settings)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        ImageProcessorConfig.from_checkpoint(tmp_path)
