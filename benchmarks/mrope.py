"""mRoPE positions: `lmdeploy_ext.mrope` beside transformers' ``get_rope_index``.

``python -m benchmarks.mrope`` from the repository root.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from benchmarks.common import compare, environment, markdown, spread, write_results
from lmdeploy_ext.mrope import mrope_positions

Prompt = tuple[int, list[tuple[int, int]], list[tuple[int, int, int]]]


def make_prompt(length: int, images: int, rows: int, columns: int) -> Prompt:
    """Images of one merged size, spread evenly over a prompt: length, spans, grids."""
    tokens = rows * columns
    text = length - images * tokens
    if text < images + 1:
        raise ValueError(f"{images} images of {tokens} tokens do not fit {length} tokens")
    begins = [(i + 1) * text // (images + 1) + i * tokens for i in range(images)]
    spans = [(begin, begin + tokens) for begin in begins]
    return length, spans, [(1, 2 * rows, 2 * columns)] * images


def transformers_model() -> Qwen3VLModel:
    """Without weights: ``get_rope_index`` only reads the configuration."""
    config = Qwen3VLConfig(
        text_config={"num_hidden_layers": 0, "hidden_size": 16, "vocab_size": 16},
        vision_config={"depth": 0, "hidden_size": 16, "deepstack_visual_indexes": []},
    )
    with torch.device("meta"):
        return Qwen3VLModel(config)


def run(prompt: Prompt, repeats: int, loops: int) -> dict[str, object]:
    length, spans, grids = prompt
    model = transformers_model()
    ids = torch.zeros(1, length, dtype=torch.long)
    types = torch.zeros(1, length, dtype=torch.int)
    for begin, end in spans:
        types[0, begin:end] = 1
    image_grid = torch.tensor(grids)
    grid_array = np.array(grids)

    def theirs() -> torch.Tensor:
        for _ in range(loops):
            positions, _ = model.get_rope_index(ids, types, image_grid_thw=image_grid)
        return positions

    def ours() -> np.ndarray:
        for _ in range(loops):
            positions, _ = mrope_positions(length, spans, grid_array)
        return positions

    np.testing.assert_array_equal(ours(), theirs()[:, 0].numpy())
    samples = compare({"transformers": theirs, "ours": ours}, repeats)
    scale = 1e3 / loops
    return {
        "tokens": length,
        "images": len(spans),
        "transformers ms": spread(samples["transformers"], scale, 3),
        "ours ms": spread(samples["ours"], scale, 3),
        "times faster": samples["transformers"].median / samples["ours"].median,
        "seconds": {name: sample.row(1 / loops) for name, sample in samples.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--loops", type=int, default=10, help="calls per timed round")
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.loops = 3, 2
    prompts = [
        make_prompt(1024, 1, 15, 20),
        make_prompt(4096, 2, 30, 40),
        make_prompt(16384, 8, 30, 40),
        make_prompt(16384, 32, 15, 20),
    ]
    rows = [run(prompt, arguments.repeats, arguments.loops) for prompt in prompts]
    notes = (
        "Milliseconds for one prompt, allocation included: median (fastest-slowest round). "
        "Both start from what their callers hold: spans, or token types. The results are equal."
    )
    write_results("mrope", rows, notes)
    print(environment())
    print(markdown([{k: v for k, v in row.items() if k != "seconds"} for row in rows]))


if __name__ == "__main__":
    main()
