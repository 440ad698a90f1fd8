"""Batched forward passes over the weights of a transformers Qwen3-VL model, for training.

transformers packs images of any size into one sequence and builds masks for it. Training batches
hold images of one size only, so the same computation is written here for whole batches: about
three times faster on a CPU. `tests/drawings/test_training.py` holds it to the transformers classes.

Letters: B batch, P patches of an image, T = P / 4 merged tokens, L sequence, D decoder width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from examples.drawings.architecture import MERGE, PATCH


@dataclass(frozen=True)
class Grid:
    """Patches of an image: `rows` x `columns`, both even."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns // MERGE**2

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.columns * PATCH, self.rows * PATCH


@cache
def vision_tables(vision_tower: Any, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position-grid indices and weights, and the rotary cosine and sine of one grid."""
    thw = torch.tensor([[1, grid.rows, grid.columns]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        thw,
        vision_tower.num_grid_per_side,
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=MERGE,
    )
    cos, sin = vision_tower.rotary_pos_emb(torch.zeros(1), get_vision_position_ids(thw, MERGE))
    return indices, weights, cos, sin


def patchify(pixels: Tensor) -> Tensor:
    """(B, height, width, 3) uint8 -> (B, P, 768), normalised, each 2x2 merge block contiguous.

    One frame only: a still image is doubled in time, so that the two frames' weights add up.
    """
    batch, height, width, _ = pixels.shape
    blocks = pixels.float().div(127.5).sub(1).permute(0, 3, 1, 2)
    side = MERGE * PATCH
    blocks = blocks.reshape(batch, 3, height // side, MERGE, PATCH, width // side, MERGE, PATCH)
    return blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, -1, 3 * PATCH**2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """Attention over (B, heads, L, head size); one key-value head serves all query heads.

    Plain matrix products: on a CPU the backward pass of the fused kernel is ten times slower.
    """
    batch, heads, length, size = query.shape
    shared = key.shape[1]
    rows = (query * size**-0.5).reshape(batch * shared, heads // shared * length, size)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    scores = torch.bmm(rows, key.transpose(1, 2))
    if causal:
        future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future.repeat(heads // shared, 1), float("-inf"))
    weights = F.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(weights, value).view(batch, heads, length, size)


def vision_block(block: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One pre-norm block of the vision tower, (B, P, width) -> (B, P, width)."""
    batch, count, width = hidden.shape
    packed = block.attn.qkv(block.norm1(hidden))
    packed = packed.view(batch, count, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = packed.unbind(0)
    query, key = (_rotate(x, cos, sin).to(value.dtype) for x in (query, key))
    mixed = attend(query, key, value)
    hidden = hidden + block.attn.proj(mixed.transpose(1, 2).reshape(batch, count, width))
    return hidden + block.mlp(block.norm2(hidden))


def vision_features(
    tower: Any, pixels: Tensor, indices: Tensor, weights: Tensor, cos: Tensor, sin: Tensor
) -> list[Tensor]:
    """uint8 images -> the merged features and each DeepStack feature, (B, T, D) each."""
    patches = patchify(pixels)
    projection = tower.patch_embed.proj
    kernel = projection.weight.sum(2).flatten(1)  # sum over the two equal frames
    hidden = F.linear(patches, kernel, projection.bias)
    hidden = hidden + (tower.pos_embed(indices) * weights[..., None]).sum(1)
    deepstack: list[Tensor] = []
    for index, block in enumerate(tower.blocks):
        hidden = vision_block(block, hidden, cos, sin)
        if index in tower.deepstack_visual_indexes:
            merger = tower.deepstack_merger_list[len(deepstack)]
            deepstack.append(merger(hidden))
    merged = [tower.merger(hidden), *deepstack]
    return [x.view(len(pixels), -1, x.shape[-1]) for x in merged]


def decoder_states(
    decoder: Any, ids: Tensor, features: list[Tensor], is_image: Tensor, cos: Tensor, sin: Tensor
) -> list[Tensor]:
    """States (B, L, D) behind each layer, the last one normed.

    For right-padded sequences whose images share their places.

    features: merged and DeepStack features already laid out over the sequence, (B, L, D), zero
    where there is no image; is_image: (L, 1), one at image tokens; cos, sin: (L, head size).
    """
    hidden, states = decoder.embed_tokens(ids) * (1 - is_image) + features[0], []
    for index, layer in enumerate(decoder.layers):
        hidden = decoder_layer(layer, hidden, cos, sin)
        if index + 1 < len(features):
            hidden = hidden + features[index + 1]
        states.append(hidden)
    return [*states[:-1], decoder.norm(hidden)]


def decoder_layer(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One pre-norm decoder layer, (B, L, D) -> (B, L, D)."""
    attention = layer.self_attn
    batch, length, _ = hidden.shape
    shape = (batch, length, -1, attention.head_dim)
    normed = layer.input_layernorm(hidden)
    query = attention.q_norm(attention.q_proj(normed).view(shape)).transpose(1, 2)
    key = attention.k_norm(attention.k_proj(normed).view(shape)).transpose(1, 2)
    value = attention.v_proj(normed).view(shape).transpose(1, 2)
    query, key = (_rotate(x, cos, sin).to(value.dtype) for x in (query, key))
    mixed = attend(query, key, value, causal=True)
    hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def compile_blocks() -> None:
    """Compile the repeated blocks, once for all layers and sizes (about a minute each)."""
    global vision_block, decoder_layer
    vision_block = torch.compile(vision_block, dynamic=True)
    decoder_layer = torch.compile(decoder_layer, dynamic=True)
