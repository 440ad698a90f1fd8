"""Converts the checkpoint's tensors to those of this tower: names, expected shapes and folded
weights.

Letters: D hidden size; C channels; T frames per patch; p pixels per patch side; H heads; d = D/H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy_ext.encoder.config import VisionConfig
from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig

ZERO_LEVEL = 128  # subtracted from uint8 pixels; the difference is exact even in bfloat16


def checkpoint_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Name (without prefix) and shape of every tensor that the checkpoint must contain."""
    size, wide, merged = config.hidden_size, config.intermediate_size, config.merged_size
    patch = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (size, *patch),
        "patch_embed.proj.bias": (size,),
        "pos_embed.weight": (config.num_position_embeddings, size),
    }

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    for number in range(config.depth):
        block = f"blocks.{number}"
        norm(f"{block}.norm1", size)
        norm(f"{block}.norm2", size)
        linear(f"{block}.attn.qkv", size, 3 * size)
        linear(f"{block}.attn.proj", size, size)
        linear(f"{block}.mlp.linear_fc1", size, wide)
        linear(f"{block}.mlp.linear_fc2", wide, size)
    deepstack = [f"deepstack_merger_list.{k}" for k in range(len(config.deepstack_visual_indexes))]
    for merger in ["merger", *deepstack]:
        norm(f"{merger}.norm", size if merger == "merger" else merged)
        linear(f"{merger}.linear_fc1", merged, merged)
        linear(f"{merger}.linear_fc2", merged, config.out_hidden_size)
    return shapes


def module_name(name: str) -> str:
    """The parameter of `VisionEncoder` that a checkpoint tensor belongs to."""
    head, _, tail = name.partition(".linear_")
    if not tail:
        return name
    return f"{head}.{tail}" if head.endswith(".mlp") else f"{head}.mlp.{tail}"


def pair_up(qkv: Tensor, num_heads: int) -> Tensor:
    """Reorder the query and key rows of a packed qkv weight or bias into rotary pairs.

    In the checkpoint, values i and i + d/2 form a pair. With adjacent pairs, a query is d/2 complex
    numbers and the rotation is one multiplication. Attention scores do not change, because queries
    and keys have the same order.
    """
    size = qkv.shape[0] // 3
    half = size // num_heads // 2
    query_key = qkv[: 2 * size].reshape(2 * num_heads, 2, half, *qkv.shape[1:]).transpose(1, 2)
    return torch.cat([query_key.flatten(0, 2), qkv[2 * size :]])


def fold_patch_embed(
    weight: Tensor, bias: Tensor, processor: ImageProcessorConfig
) -> dict[str, Tensor]:
    """Linear weights for uint8 pixels minus `ZERO_LEVEL`, from the convolution float32 (D,C,T,p,p).

    ``W ((x/255 - mean)/std) + b  =  W/(255 std) (x - 128)  +  b + sum W (128/255 - mean)/std``
    """
    mean = torch.tensor(processor.mean).reshape(-1, 1, 1, 1)
    std = torch.tensor(processor.std).reshape(-1, 1, 1, 1)
    offset = (weight * ((ZERO_LEVEL / 255 - mean) / std)).flatten(1).sum(1)
    scaled = weight / (255 * std)
    return {
        "still.weight": scaled.sum(2).flatten(1),
        "still.bias": bias + offset,
        "pair.weight": scaled.flatten(1),
        "pair.bias": bias + offset,
    }


def check_processor(config: VisionConfig, processor: ImageProcessorConfig) -> None:
    """Raise ValueError if the patches of the pre-processing do not fit the tower."""
    for name, ours, theirs in (
        ("patch_size", config.patch_size, processor.patch_size),
        ("temporal_patch_size", config.temporal_patch_size, processor.temporal_patch_size),
        ("merge_size", config.spatial_merge_size, processor.merge_size),
        ("channels", config.in_channels, len(processor.mean)),
    ):
        if ours != theirs:
            raise ValueError(f"{name} is {ours} in vision_config but {theirs} in pre-processing")
