"""The layers of the vision tower.

Letters: R rows = patches of all images; D hidden size; H heads; d = D/H; M merged tokens;
O output size; B images of L patches each in one attention call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from timm.layers.activations import GELUTanh
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from lmdeploy_ext.encoder.config import VisionConfig

_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Patches (R, C*p*p) or (R, C*2*p*p), uint8 values minus 128, to (R, D).

    The 3-D convolution of the checkpoint covers exactly one patch, so it is equivalent to a linear
    layer. A still image has the same frame twice, so the two halves of the weight are summed at
    load time, which halves the work. The normalisation of pixels is folded into weight and bias.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        columns = config.frame_values
        self.still = nn.Linear(columns, config.hidden_size)
        self.pair = nn.Linear(columns * config.temporal_patch_size, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        layer = self.still if pixels.shape[1] == self.still.in_features else self.pair
        result: Tensor = layer(pixels)
        return result


class Attention(nn.Module):
    """Full attention within each image.

    Query and key rows are stored in rotary pairs, see `weights.pair_up`. Queries, keys and values
    are stored head by head before the attention kernel: torch's CPU kernel is about 10 % faster on
    contiguous heads than on interleaved ones, and the rotation writes this layout at no extra cost.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotary: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
        """x (R, D), rotary complex64 (R, d/2), groups of (B, L) in row order -> (R, D)."""
        heads = self.qkv(x).view(len(x), 3 * self.num_heads, -1).transpose(0, 1)  # (3H, R, d)
        query, key = _rotate(heads[: 2 * self.num_heads], rotary).chunk(2)
        value = heads[2 * self.num_heads :].contiguous()
        outputs = []
        start = 0
        for count, length in groups:
            rows = slice(start, start + count * length)
            shape = (self.num_heads, count, length, -1)
            q, k, v = (part[:, rows].view(shape).transpose(0, 1) for part in (query, key, value))
            attended = F.scaled_dot_product_attention(q, k, v)  # (B, H, L, d)
            outputs.append(attended.transpose(1, 2).reshape(count * length, -1))
            start += count * length
        result: Tensor = self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs))
        return result


class Block(nn.Module):
    """A pre-LayerNorm transformer block; modifies its input in place."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, eps=_EPS)
        self.norm2 = LayerNorm(config.hidden_size, eps=_EPS)
        self.attn = Attention(config)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, act_layer=GELUTanh)

    def forward(self, x: Tensor, rotary: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
        x += self.attn(self.norm1(x), rotary, groups)
        x += run_mlp(self.mlp, self.norm2(x))
        return x


class Merger(nn.Module):
    """Merges each block of adjacent patches into one token: (R, D) -> (M, O).

    The main merger normalises each patch, a DeepStack merger the whole block.
    """

    def __init__(self, config: VisionConfig, norm_block: bool) -> None:
        super().__init__()
        self.size = config.merged_size
        self.norm_block = norm_block
        self.norm = LayerNorm(self.size if norm_block else config.hidden_size, eps=_EPS)
        self.mlp = Mlp(self.size, self.size, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.view(-1, self.size)
        blocks = self.norm(blocks) if self.norm_block else self.norm(x).view(-1, self.size)
        return run_mlp(self.mlp, blocks)


def run_mlp(mlp: Mlp, x: Tensor) -> Tensor:
    """timm's Mlp on x (rows, inputs); on a CPU, oneDNN fuses the GELU into the matrix product."""
    approximate = "tanh" if isinstance(mlp.act, GELUTanh) else "none"
    if x.device.type != "cpu" or not _gelu_fuses(x.dtype, approximate):
        result: Tensor = mlp(x)
        return result
    hidden = torch.ops.mkldnn._linear_pointwise(
        x, mlp.fc1.weight, mlp.fc1.bias, "gelu", [], approximate
    )
    result = mlp.fc2(hidden)
    return result


@cache
def _gelu_fuses(dtype: torch.dtype, approximate: str) -> bool:
    """Whether oneDNN's fused linear-with-GELU operator exists and computes correct numbers.

    Aten's GELU takes a sixth of the time of the preceding matrix product. torch's compiler emits
    the fused operator, but the operator is not a public interface, so this function tests it.
    """
    x = torch.linspace(-3, 3, 64, dtype=dtype).reshape(4, 16)
    weight = torch.eye(16, dtype=dtype)
    bias = torch.linspace(-1, 1, 16, dtype=dtype)
    expected = F.gelu(F.linear(x, weight, bias), approximate=approximate)
    try:
        fused = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(fused.float(), expected.float(), rtol=2e-2, atol=1e-2)


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the pairs of x (heads, R, d) by complex64 (R, d/2), in float32; returns a contiguous
    tensor."""
    turned = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    pairs = torch.view_as_complex(turned.view(*x.shape[:-1], -1, 2))
    if x.dtype == torch.float32:
        source = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
        torch.mul(source, rotary, out=pairs)
        return turned
    turned.copy_(x)
    pairs.mul_(rotary)
    return turned.to(x.dtype)
