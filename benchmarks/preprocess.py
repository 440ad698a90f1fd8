"""Image pre-processing: `lmdeploy_ext.encoder.preprocess` beside transformers' fast processor.

``python -m benchmarks.preprocess`` from the repository root.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from benchmarks.common import compare, environment, markdown, spread, write_results
from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig, normalise, preprocess

CONFIG = ImageProcessorConfig()
Contenders = dict[str, Callable[[], object]]


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colour with some noise, so that it compresses like a photo. uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def ours_uint8(images: list[np.ndarray]) -> np.ndarray:
    patches = [preprocess(image, CONFIG).patches for image in images]
    return patches[0] if len(patches) == 1 else np.concatenate(patches)


def transformers_processor() -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor(
        size={"shortest_edge": CONFIG.min_pixels, "longest_edge": CONFIG.max_pixels},
        patch_size=CONFIG.patch_size,
        image_mean=list(CONFIG.mean),
        image_std=list(CONFIG.std),
    )


def from_arrays(images: list[np.ndarray], processor: Qwen2VLImageProcessor) -> Contenders:
    """Decoded images, uint8 (H, W, 3) each, to what each tower takes (and to the same format)."""
    return {
        "transformers": lambda: processor(images=images, return_tensors="pt")["pixel_values"],
        "ours": lambda: ours_uint8(images),
        "ours float32": lambda: normalise(ours_uint8(images), CONFIG),
    }


def from_jpeg(files: list[bytes], processor: Qwen2VLImageProcessor) -> Contenders:
    """JPEG bytes to what each tower takes; both decode with Pillow, one file after the other."""

    def decoded() -> list[Image.Image]:
        return [Image.open(io.BytesIO(data)).convert("RGB") for data in files]

    def arrays() -> list[np.ndarray]:
        return [np.array(image) for image in decoded()]

    return {
        "transformers": lambda: processor(images=decoded(), return_tensors="pt")["pixel_values"],
        "ours": lambda: ours_uint8(arrays()),
        "ours float32": lambda: normalise(ours_uint8(arrays()), CONFIG),
    }


def run(name: str, contenders: Contenders, repeats: int) -> dict[str, object]:
    difference = np.abs(
        np.asarray(contenders["transformers"]()) - contenders["ours float32"]()
    ).max()
    if difference > 1 / 255:
        raise RuntimeError(f"{name}: results differ by {difference}")
    samples = compare(contenders, repeats)
    row: dict[str, object] = {"case": name}
    row |= {f"{key} ms": spread(sample) for key, sample in samples.items()}
    row["times faster"] = samples["transformers"].median / samples["ours"].median
    row["times faster float32"] = samples["transformers"].median / samples["ours float32"].median
    row["largest difference"] = float(difference)
    row["seconds"] = {key: sample.row(1) for key, sample in samples.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats = 3
    torch.set_num_threads(arguments.threads)
    processor = transformers_processor()
    small, photo = smooth_image(480, 640), smooth_image(1080, 1920)
    batch = [smooth_image(480, 640, seed) for seed in range(8)]
    rows = [
        run("640x480, from JPEG", from_jpeg([jpeg(small)], processor), arguments.repeats),
        run("1920x1080, from JPEG", from_jpeg([jpeg(photo)], processor), arguments.repeats),
        run("640x480, decoded", from_arrays([small], processor), arguments.repeats),
        run("1920x1080, decoded", from_arrays([photo], processor), arguments.repeats),
        run(
            "8 of 640x480, from JPEG",
            from_jpeg(list(map(jpeg, batch)), processor),
            arguments.repeats,
        ),
        run("8 of 640x480, decoded", from_arrays(batch, processor), arguments.repeats),
    ]
    notes = (
        f"Milliseconds: median (fastest-slowest round), {arguments.threads} torch threads. Each ends "
        "in what its vision tower takes: transformers in normalised float32 patches, 'ours' in uint8 "
        "patches, an eighth of the bytes, because our tower folds the normalisation into its first "
        "layer. 'ours float32' goes on to the format of transformers; 'largest difference' is between "
        "those two. 640x480 needs no resampling, 1920x1080 becomes 1920x1088."
    )
    write_results("preprocess", rows, notes)
    print(environment())
    print(markdown([{k: v for k, v in row.items() if k != "seconds"} for row in rows]))


if __name__ == "__main__":
    main()
