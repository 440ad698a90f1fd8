"""Small random towers, in transformers as the oracle and in ours, with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from lmdeploy_ext.encoder import ImageProcessorConfig, VisionConfig, VisionEncoder, normalise
from lmdeploy_ext.packing import PackedImage

PROCESSOR = ImageProcessorConfig()
TINY = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_heads": 2,
    "out_hidden_size": 96,
    "num_position_embeddings": 49,
    "deepstack_visual_indexes": [0, 1, 3],
}


def oracle(seed: int = 0, **changes: Any) -> Qwen3VLVisionModel:
    """A transformers tower whose weights are all random, biases and norms included."""
    torch.manual_seed(seed)
    config = Qwen3VLVisionConfig(**{**TINY, **changes})
    config._attn_implementation = "sdpa"
    model = Qwen3VLVisionModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            scale = 1.0 if name == "pos_embed.weight" else parameter.shape[-1] ** -0.5
            parameter.copy_(centre + scale * torch.randn_like(parameter))
    return model


def ours(model: Qwen3VLVisionModel, dtype: torch.dtype = torch.float32) -> VisionEncoder:
    config = VisionConfig.from_dict(model.config.to_dict())
    return VisionEncoder.from_tensors(config, model.state_dict(), PROCESSOR, dtype)


def random_image(rng: np.random.Generator, h: int, w: int, frames: int = 1) -> PackedImage:
    """Random patches of a still (one frame) or a frame pair (two), grid (1, h, w)."""
    patches = rng.integers(0, 256, (h * w, frames * 768), dtype=np.uint8)
    return PackedImage(patches, (1, h, w))


def run_oracle(
    model: Qwen3VLVisionModel, images: list[PackedImage]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    pixels = np.concatenate([normalise(image.patches, PROCESSOR) for image in images])
    grids = torch.tensor([image.grid for image in images])
    with torch.inference_mode():
        output = model(torch.from_numpy(pixels).to(model.dtype), grids)
    return output.pooler_output, output.deepstack_features
