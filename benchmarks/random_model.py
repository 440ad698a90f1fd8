"""Checkpoints of the shape of Qwen3-VL with random weights, written in seconds: 2B, 8B, and smaller ones.

A file of 17 GB is written as fast as the disk takes it: one block of normal numbers is made, scaled
for each kind of tensor and written again and again, each tensor beginning at another place of it.
No tensor repeats within itself in a way that its rows would be equal.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "chat_template.jinja", "preprocessor_config.json",
                   "video_preprocessor_config.json")  # fmt: skip
BLOCK = (1 << 23) + 12_347
"""Numbers in the block: not a multiple of any width."""
PIXELS = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
"""Bounds of an image's pixels as the published checkpoints have them."""


@dataclass(frozen=True)
class Shape:
    """Fields of the decoder and of the vision tower, as `Qwen3VLConfig` names them."""

    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool
    vocabulary: int = 151_936


SHAPES = {
    "2B": Shape(
        {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16,
         "num_key_value_heads": 8, "num_hidden_layers": 28},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "depth": 24,
         "deepstack_visual_indexes": [5, 11, 17]},
        tied=True,
    ),
    "8B": Shape(
        {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
         "num_key_value_heads": 8, "num_hidden_layers": 36},
        {"hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "depth": 27,
         "deepstack_visual_indexes": [8, 16, 24]},
        tied=False,
    ),
    "small": Shape(
        {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 12},
        {"hidden_size": 384, "intermediate_size": 1536, "num_heads": 6, "depth": 9,
         "deepstack_visual_indexes": [2, 4, 6], "num_position_embeddings": 2304},
        tied=True, vocabulary=2048,
    ),
    "tiny": Shape(
        {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 2,
         "num_key_value_heads": 1, "num_hidden_layers": 2},
        {"hidden_size": 128, "intermediate_size": 192, "num_heads": 2, "depth": 3,
         "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 2304},
        tied=True, vocabulary=2048,
    ),
    "tiny, untied": Shape(
        {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 2,
         "num_key_value_heads": 1, "num_hidden_layers": 3},
        {"hidden_size": 144, "intermediate_size": 208, "num_heads": 2, "depth": 3,
         "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 2304},
        tied=False, vocabulary=2048,
    ),
}  # fmt: skip
"""small: 40 million parameters, with which llama.cpp takes about a second for an answer on one core.
The tiny ones are the smallest for which TurboMind has kernels: heads of 64 and 72 in the tower."""


def write_random_model(
    folder: Path, like: Path, layers: int | None = None, size: str = "2B", seed: int = 0
) -> Path:
    """Write a bfloat16 checkpoint with the tokenizer and the special ids of another one.

    The logits of all shapes but the tiny ones are far wider than the tokenizer. End tokens are never
    the greedy choice: their rows of the output layer are zero. The other weights have sizes with
    which every layer matters.

    Args:
        layers: decoder layers and vision blocks; None takes those of the published checkpoint.
        size: one of `SHAPES`.
    """
    shape = SHAPES[size]
    special = json.loads((like / "config.json").read_text())
    ends = json.loads((like / "generation_config.json").read_text())
    config = _config(shape, special, layers)
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (like / name).is_file():
            shutil.copy(like / name, folder / name)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        path = folder / name
        if path.is_file() and not size.startswith("tiny"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"size": PIXELS}))
    (folder / "generation_config.json").write_text(json.dumps(ends))
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    config.save_pretrained(folder)
    silent = ends["eos_token_id"]
    _write_weights(
        folder / "model.safetensors", _tensors(config, shape.tied), seed,
        silent if isinstance(silent, list) else [silent],
    )  # fmt: skip
    return folder


def _config(shape: Shape, special: dict[str, Any], layers: int | None) -> Any:
    text, vision = dict(shape.text), dict(shape.vision)
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
    text |= {name: special["text_config"][name] for name in tokens}
    if layers is not None:
        text["num_hidden_layers"] = vision["depth"] = layers
        vision["deepstack_visual_indexes"] = sorted({layers // 3, layers // 2, layers - 1})
    return Qwen3VLConfig(
        text_config={
            **text, "vocab_size": shape.vocabulary, "head_dim": 128, "dtype": "bfloat16",
            "max_position_embeddings": 4096, "tie_word_embeddings": shape.tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0,
                                "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=shape.tied, dtype="bfloat16",
        **{name: special[name] for name in ("image_token_id", "video_token_id",
                                            "vision_start_token_id", "vision_end_token_id")},
    )  # fmt: skip


def _tensors(config: Any, tied: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights; no memory is taken for them."""
    with torch.device("meta"):
        model: Any = Qwen3VLForConditionalGeneration(config)
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del names["lm_head.weight"]
    return names


def _write_weights(
    path: Path, tensors: dict[str, tuple[int, ...]], seed: int, silent: list[int]
) -> None:
    """Write a safetensors file, several tensors at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    blocks = _Blocks(seed)
    output = "lm_head.weight" if "lm_head.weight" in tensors else _embedding(tensors)
    kept = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.pwrite(kept, len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(kept, begin + end)

        def write(name: str) -> None:
            shape, at = tensors[name], begin + header[name]["data_offsets"][0]
            for piece in blocks.pieces(name, shape):
                at += os.pwrite(kept, piece, at)
            if name == output:
                for row in silent:
                    place = begin + header[name]["data_offsets"][0] + row * shape[1] * 2
                    os.pwrite(kept, bytes(shape[1] * 2), place)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(write, tensors))
    finally:
        os.close(kept)


def _embedding(tensors: dict[str, tuple[int, ...]]) -> str:
    (name,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    return name


class _Blocks:
    """The block of random numbers in each scale that is needed, as bfloat16."""

    def __init__(self, seed: int) -> None:
        source = np.random.default_rng(seed)
        self._normal = torch.from_numpy(source.standard_normal(BLOCK, dtype=np.float32))
        self._made: dict[float | None, memoryview] = {}

    def pieces(self, name: str, shape: tuple[int, ...]) -> Any:
        """The bytes of a tensor in pieces, the first from a place that follows from its name."""
        block = self._scaled(_scale(name, shape))
        left = 2 * prod(shape)
        digest = hashlib.sha256(name.encode()).digest()
        at = 2 * (int.from_bytes(digest[:8], "little") % BLOCK)
        while left:
            piece = block[at : at + min(left, len(block) - at)]
            left -= len(piece)
            at = 0
            yield piece

    def _scaled(self, scale: float | None) -> memoryview:
        if scale not in self._made:
            values = self._normal * (scale or 0.15) + (0.0 if scale else 1.0)
            self._made[scale] = memoryview(values.bfloat16().view(torch.uint8).numpy())
        return self._made[scale]


def _scale(name: str, shape: tuple[int, ...]) -> float | None:
    """Standard deviation; None for a norm's weights, which lie around 1."""
    if "norm" in name and name.endswith("weight"):
        return None
    if "pos_embed" in name:
        return 1.0  # as large as what the patches give
    return 0.2 if len(shape) == 1 else 1.2 / float(prod(shape[1:])) ** 0.5
