"""How far JPEG images differ when they are decoded at a part of their size (``jpeg_scaled_pixels``).

``python -m benchmarks.jpeg_scaling [FILE …]`` prints a table: the difference from full decoding with
the same resizing behind it, of 255, at the size of the scaled image and as the model gets it. Without
files it takes a generated scene.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.image_memory import scene
from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig, preprocess
from lmdeploy_ext.images.files import ImageLimits
from service.inference.images import check_header, decode, decode_image

CONFIG = ImageProcessorConfig()


def difference(one: np.ndarray, other: np.ndarray) -> str:
    """Mean, 99th percentile and maximum of the absolute difference."""
    apart = np.abs(one.astype(np.int16) - other)
    return f"{apart.mean():.2f} | {np.percentile(apart, 99):.0f} | {apart.max()}"


def rows(name: str, data: bytes) -> list[str]:
    """The rows of the table for one file."""
    started = time.perf_counter()
    full = decode_image(data, "image", ImageLimits())
    full_s = time.perf_counter() - started
    found = []
    for scale in (2, 4, 8):
        bound = -(-full.shape[0] // scale) * -(-full.shape[1] // scale)
        limits = ImageLimits(jpeg_scaled_pixels=bound)
        header = check_header(data, "image", limits)
        if header.scale != scale:
            continue
        started = time.perf_counter()
        scaled = decode(data, header, "image", limits)[:]
        scaled_s = time.perf_counter() - started
        height, width, _ = scaled.shape
        exact = Image.fromarray(full).resize((width, height), Image.Resampling.BICUBIC)
        area = height * width // 2
        as_model = [preprocess(one, CONFIG, 32 * 32, area).patches for one in (full, scaled)]
        same = as_model[0].shape == as_model[1].shape
        model = difference(*as_model) if same else "another grid | |"
        found.append(
            f"| {name} | 1/{scale} | {difference(scaled, np.asarray(exact))} | {model} | "
            f"{full_s / scaled_s:.1f} |"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    made = io.BytesIO()
    scene(4000, 3000).save(made, "JPEG", quality=90)
    images = {path.name: path.read_bytes() for path in options.files} or {"scene": made.getvalue()}
    print(
        "| image | scale | mean | p99 | max | as the model gets it: mean | p99 | max | times faster |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, data in images.items():
        print("\n".join(rows(name, data)))


if __name__ == "__main__":
    main()
