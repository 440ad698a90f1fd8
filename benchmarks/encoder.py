"""Vision tower: `lmdeploy_ext.encoder` beside transformers' ``Qwen3VLVisionModel``, same weights.

``python -m benchmarks.encoder`` from the repository root. The tower has the shape of Qwen3-VL-2B's
and random weights, which both contenders share; it needs about 3 GB in float32. All layers are
alike, so the time grows in proportion to the depth: one small image goes through all 24 layers,
the larger cases through 6, which keeps the run at minutes. ``--depth`` sets it for all.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from benchmarks.common import compare, environment, markdown, spread, write_results
from lmdeploy_ext.encoder import ImageProcessorConfig, VisionConfig, VisionEncoder, normalise
from lmdeploy_ext.packing import PackedImage

PROCESSOR = ImageProcessorConfig()
FULL_DEPTH = 24
DEPTHS = {"640x480": FULL_DEPTH, "1280x960": 6, "8 mixed": 6}
CASES = {  # height, width in pixels of each image
    "640x480": [(480, 640)],
    "1280x960": [(960, 1280)],
    "8 mixed": [
        (480, 640), (640, 480), (256, 256), (384, 512),
        (320, 320), (608, 800), (224, 480), (480, 640),
    ],
}  # fmt: skip


def transformers_tower(depth: int, dtype: torch.dtype, device: str) -> Qwen3VLVisionModel:
    config = Qwen3VLVisionConfig(
        depth=depth,
        hidden_size=1024,
        intermediate_size=4096,
        num_heads=16,
        out_hidden_size=2048,
        deepstack_visual_indexes=[depth // 4 - 1, depth // 2 - 1, depth * 3 // 4 - 1],
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return Qwen3VLVisionModel(config).to(device, dtype).eval()


def packed_images(sizes: list[tuple[int, int]]) -> list[PackedImage]:
    rng = np.random.default_rng(0)
    grids = [(1, height // 16, width // 16) for height, width in sizes]
    return [
        PackedImage(rng.integers(0, 256, (h * w, 768), dtype=np.uint8), (1, h, w))
        for _, h, w in grids
    ]


def run(
    name: str, model: Qwen3VLVisionModel, encoder: VisionEncoder, repeats: int, warmup: int
) -> dict[str, object]:
    images = packed_images(CASES[name])
    floats = np.concatenate([normalise(image.patches, PROCESSOR) for image in images])
    pixels = torch.from_numpy(floats).to(encoder.device, encoder.dtype)
    grids = torch.tensor([image.grid for image in images], device=encoder.device)

    def wait() -> None:
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def theirs() -> torch.Tensor:
        features: torch.Tensor = model(pixels, grids).pooler_output
        wait()
        return features

    def ours() -> torch.Tensor:
        features = encoder.encode(images).embeddings
        wait()
        return features

    difference = (ours().float() - theirs().float()).abs().max().item()
    samples = compare({"transformers": theirs, "ours": ours}, repeats, warmup)
    return {
        "images": name,
        "patches": len(pixels),
        "depth": encoder.config.depth,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "transformers s": spread(samples["transformers"], 1),
        "ours s": spread(samples["ours"], 1),
        "times faster": samples["transformers"].median / samples["ours"].median,
        "largest difference": difference,
        "seconds": {key: sample.row(1) for key, sample in samples.items()},
    }


def by_depth(names: list[str], depth: int | None) -> dict[int, list[str]]:
    """The cases that share a tower."""
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(depth or DEPTHS[name], []).append(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=0, help="rounds beside the one that checks")
    parser.add_argument("--depth", type=int, help=f"of every case; default: {DEPTHS}")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one case, few layers, one round")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.depth, arguments.cases = 1, 4, ["640x480"]
        arguments.dtypes = ["float32"]
    torch.set_num_threads(arguments.threads)
    rows = []
    for dtype_name in arguments.dtypes:
        dtype = getattr(torch, dtype_name)
        for depth, names in by_depth(arguments.cases, arguments.depth).items():
            model = transformers_tower(depth, dtype, arguments.device)
            config = VisionConfig.from_dict(model.config.to_dict())
            encoder = VisionEncoder.from_tensors(
                config, model.state_dict(), PROCESSOR, dtype, arguments.device
            )
            for name in names:
                rows.append(run(name, model, encoder, arguments.repeats, arguments.warmup))
                print(rows[-1], flush=True)
            del model, encoder
    notes = (
        f"Seconds: median (fastest-slowest round). Qwen3-VL-2B's vision shape, random weights, "
        f"{arguments.device}, {arguments.threads} torch threads, transformers with SDPA. The whole "
        f"tower has {FULL_DEPTH} layers, all alike; the larger cases run fewer to save time. "
        "transformers starts from normalised pixels on the device, ours from uint8 patches on the "
        "host."
    )
    write_results("encoder", rows, notes)
    print(environment())
    print(markdown([{k: v for k, v in row.items() if k != "seconds"} for row in rows]))


if __name__ == "__main__":
    main()
