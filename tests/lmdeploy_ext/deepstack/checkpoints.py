"""Tiny random checkpoints in which DeepStack decides what is answered."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.host_runtime.checkpoints import write_vision_checkpoint
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape


def write_loud_checkpoint(folder: Path, shape: EngineShape, seed: int = 0) -> Path:
    """Write a random Qwen3-VL checkpoint whose DeepStack features are as large as its hidden states."""
    write_vision_checkpoint(folder, shape, seed)
    path = folder / "model.safetensors"
    weights = load_file(path)
    source = torch.Generator().manual_seed(seed + 1)
    for name, weight in weights.items():
        if "deepstack_merger_list" not in name or not name.endswith("linear_fc2.weight"):
            continue
        values = torch.randn(weight.shape, generator=source)
        weights[name] = (values * 2.5 / weight.shape[1] ** 0.5).to(weight.dtype)
    save_file(weights, path, {"format": "pt"})
    return folder


def taps(folder: Path) -> list[int]:
    """The vision blocks that a checkpoint's features come from."""
    content = json.loads((folder / "config.json").read_text())
    return [int(block) for block in content["vision_config"]["deepstack_visual_indexes"]]
