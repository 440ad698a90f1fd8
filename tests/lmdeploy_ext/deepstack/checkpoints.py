"""Tiny random checkpoints in which DeepStack decides what is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from tests.host_runtime.checkpoints import write_vision_checkpoint
from tests.lmdeploy_ext.contract import engine_checkpoints
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape

TAPS = [0, 1, 3]
LAYERS = 4
"""More than features: what is added behind the last layer concerns no other token."""


def write_loud_checkpoint(
    folder: Path, shape: EngineShape, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write a random Qwen3-VL checkpoint whose DeepStack features are larger than its hidden states."""
    plain = engine_checkpoints._config

    def deeper(*arguments: Any) -> Any:
        config = plain(*arguments)
        config.text_config.num_hidden_layers = LAYERS
        config.vision_config.depth = TAPS[-1] + 1
        config.vision_config.deepstack_visual_indexes = TAPS
        if shape.moe:  # all take part: where a router has a near tie, the answer is either of two
            config.text_config.num_experts_per_tok = config.text_config.num_experts
        return config

    with mock.patch.object(engine_checkpoints, "_config", deeper):
        write_vision_checkpoint(folder, shape, seed)
    _make_loud(folder, seed, dtype)
    # The reference engine wants one; no request of these tests ends at it.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return folder


def _make_loud(folder: Path, seed: int, dtype: torch.dtype) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    source = torch.Generator().manual_seed(seed + 1)
    for name, weight in weights.items():
        if "deepstack_merger_list" in name and name.endswith("linear_fc2.weight"):
            weight = torch.randn(weight.shape, generator=source) * 8 / weight.shape[1] ** 0.5
        weights[name] = weight.to(dtype)
    save_file(weights, path, {"format": "pt"})
    config = folder / "config.json"
    text = config.read_text().replace('"bfloat16"', json.dumps(str(dtype)[6:]))
    config.write_text(text)
