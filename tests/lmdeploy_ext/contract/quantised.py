"""Quantised twins of tiny checkpoints, with exact numbers: each scale is a power of two.

A twin comes with a plain checkpoint that has the very values that its weights stand for.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 128
FILES = "model.safetensors"
LINEAR = re.compile(
    r"model\.language_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|mlp\.experts\.\d+\.(gate|up|down)_proj)\.weight"
)
PACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
CONFIGS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "awq": {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP},
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": True,
        "desc_act": False,
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "weights": {"group_size": GROUP, "num_bits": 4, "type": "int"},
            }
        },
    },
}
Tensors = dict[str, torch.Tensor]


def write_twins(source: Path, folder: Path, method: str, packed: bool = False) -> tuple[Path, Path]:
    """Write ``folder/quantised`` and ``folder/plain`` after the checkpoint ``source``.

    Args:
        packed: leave the experts of an MoE checkpoint packed, in the axes of the source; only for
            FP8. Otherwise each expert has tensors of its own in the quantised checkpoint.
    """
    noise = torch.Generator().manual_seed(1)
    quantised: Tensors = {}
    plain: Tensors = {}
    for name, tensor in load_file(source / FILES).items():
        found = PACKED.fullmatch(name)
        if found is not None and packed:
            values, tensors = _fp8(tensor.shape, noise)
            plain[name] = values
            quantised[name], quantised[f"{name}_scale_inv"] = (
                tensors["weight"],
                tensors["weight_scale_inv"],
            )
        elif found is not None:
            plain[name] = torch.empty(tensor.shape)
            for expert in range(len(tensor)):
                _each_expert(name, found, expert, plain, quantised, METHODS[method], noise)
        elif LINEAR.fullmatch(name):
            plain[name], tensors = METHODS[method](tensor.shape, noise)
            quantised |= {name.removesuffix("weight") + kind: t for kind, t in tensors.items()}
        else:
            plain[name] = quantised[name] = tensor
    for kind, tensors in (("quantised", quantised), ("plain", plain)):
        shutil.copytree(source, folder / kind)
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / kind / FILES)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = CONFIGS[method]
    (folder / "quantised" / "config.json").write_text(json.dumps(config))
    return folder / "quantised", folder / "plain"


def _each_expert(
    name: str,
    found: re.Match[str],
    expert: int,
    plain: Tensors,
    quantised: Tensors,
    method: Callable[..., tuple[torch.Tensor, Tensors]],
    noise: torch.Generator,
) -> None:
    """One slice of a packed tensor, (out, in), as one or two quantised tensors of its own."""
    slot = plain[name][expert]
    parts = slot.chunk(2) if found[2] == "gate_up_proj" else (slot,)
    names = ("gate_proj", "up_proj") if len(parts) == 2 else ("down_proj",)
    for part, kind in zip(parts, names, strict=True):
        values, tensors = method(part.shape, noise)
        part.copy_(values)
        prefix = f"{found[1]}.{expert}.{kind}"
        quantised |= {f"{prefix}.{suffix}": t for suffix, t in tensors.items()}


def _scales(shape: tuple[int, ...], noise: torch.Generator) -> torch.Tensor:
    return 2.0 ** torch.randint(-7, -3, shape, generator=noise)


def _fp8(shape: torch.Size, noise: torch.Generator) -> tuple[torch.Tensor, Tensors]:
    weight = torch.randn(shape, generator=noise).to(torch.float8_e4m3fn)
    scales = _scales((*shape[:-2], shape[-2] // 128, shape[-1] // 128), noise)
    wide = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)
    return weight.float() * wide, {"weight": weight, "weight_scale_inv": scales.bfloat16()}


def _int4(shape: torch.Size, noise: torch.Generator, zero: int | None) -> tuple[torch.Tensor, ...]:
    """(out, in) integers, (out, in / GROUP) scales and zeros, and the values that they stand for."""
    rows, columns = shape
    weight = torch.randint(0, 16, (rows, columns), generator=noise)
    scales = _scales((rows, columns // GROUP), noise)
    zeros = torch.randint(0, 16, scales.shape, generator=noise)
    if zero is not None:
        zeros.fill_(zero)
    wide = [x.repeat_interleave(GROUP, 1) for x in (zeros, scales)]
    return weight, scales, zeros, (weight - wide[0]) * wide[1]


def _nibbles(
    values: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))
) -> torch.Tensor:
    """Eight neighbours along ``dim`` in one int32; number ``j`` at nibble ``order[j]``."""
    split = values.unflatten(dim, (-1, 8)).unbind(dim + 1 if dim >= 0 else dim)
    packed = sum(value.long() << (4 * order[j]) for j, value in enumerate(split))
    return torch.as_tensor(packed).to(torch.int32)


def _awq(shape: torch.Size, noise: torch.Generator) -> tuple[torch.Tensor, Tensors]:
    weight, scales, zeros, values = _int4(shape, noise, None)
    order = (0, 4, 1, 5, 2, 6, 3, 7)  # AutoAWQ's "gemm" version
    return values, {
        "qweight": _nibbles(weight.T, 1, order),
        "qzeros": _nibbles(zeros.T, 1, order),
        "scales": scales.T.half(),
    }


def _gptq(shape: torch.Size, noise: torch.Generator) -> tuple[torch.Tensor, Tensors]:
    weight, scales, zeros, values = _int4(shape, noise, 8)
    return values, {
        "qweight": _nibbles(weight.T, 0),
        "qzeros": _nibbles(zeros.T - 1, 1),  # the file has one less
        "scales": scales.T.half(),
        "g_idx": torch.arange(shape[1], dtype=torch.int32) // GROUP,
    }


def _compressed(shape: torch.Size, noise: torch.Generator) -> tuple[torch.Tensor, Tensors]:
    weight, scales, _, values = _int4(shape, noise, 8)
    return values, {
        "weight_packed": _nibbles(weight, 1),
        "weight_scale": scales.bfloat16(),
        "weight_shape": torch.tensor(shape),
    }


METHODS = {"fp8": _fp8, "awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}


def dequantised(held: Tensors, configs: dict[str, dict[str, Any]]) -> Tensors:
    """Tensors of the engine with the values that they stand for; scales and zeros are merged.

    Args:
        held: path -> tensor; FP8 and 4-bit weights as flat bytes, see `exports.export`.
        configs: path of a module -> fields of its configuration.
    """
    found: Tensors = {}
    for path, tensor in held.items():
        module, _, kind = path.rpartition(".")
        scales = held.get(f"{module}.scales")
        if kind in ("scales", "zeros"):
            continue
        if kind != "weight" or scales is None:
            found[path] = tensor
            continue
        shape = (configs[module]["input_dim"], configs[module]["output_dim"])
        wide = _spread(scales.float(), shape)
        if tensor.numel() == shape[0] * shape[1]:
            found[path] = tensor.view(torch.float8_e4m3fn).reshape(shape).float() * wide
        else:
            weight = torch.stack([tensor & 15, tensor >> 4], dim=1).reshape(shape)
            found[path] = (weight - _spread(held[f"{module}.zeros"].float(), shape)) * wide
    return found


def _spread(blocks: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    for axis in (0, 1):
        blocks = blocks.repeat_interleave(shape[axis] // blocks.shape[axis], axis)
    return blocks
