"""Reads the decoder's tensors from a safetensors checkpoint.

Letters: D hidden size; H query heads; K key-value heads; d head dimension; I intermediate size;
E experts; V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from service.engines.common.config import CheckpointError, MoeConfig, TextConfig

TEXT = "model.language_model."
VISION = ("model.visual.", "visual.")
EMBEDDING = TEXT + "embed_tokens.weight"
NORM = TEXT + "norm.weight"
HEAD = "lm_head.weight"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

Shape = tuple[int, ...]


def expected_shapes(config: TextConfig) -> dict[str, Shape]:
    """The name and shape of every decoder tensor; expert tensors in transformers' axis order."""
    size = config.hidden_size
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, size), NORM: (size,)}
    if not config.tied:
        shapes[HEAD] = (config.vocab_size, size)
    for index, moe in enumerate(config.moe):
        prefix = f"{TEXT}layers.{index}."
        for name, shape in {**_attention_shapes(config), **_mlp_shapes(config, moe)}.items():
            shapes[prefix + name] = shape
    return shapes


class Checkpoint:
    """The decoder's tensors by name. All are checked at first and then read one at a time.

    Raises:
        CheckpointError: no weights, or missing, unexpected or wrongly shaped tensors; the message
        names them.
    """

    def __init__(self, folder: Path, config: TextConfig) -> None:
        self._files = _tensor_files(folder)
        self._shapes = self._stored_shapes()
        self._check(expected_shapes(config), config)

    @property
    def num_values(self) -> int:
        """Number of values in the decoder's tensors."""
        return sum(
            math.prod(shape) for name, shape in self._shapes.items() if not name.startswith(VISION)
        )

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A copy of one tensor in ``dtype``; expert tensors as (E, 2I, D) and (E, D, I), whatever
        their layout in the file."""
        # Open the file for each tensor, so that pages of copied tensors can be unmapped.
        with safe_open(self._files[name], framework="pt") as file:
            stored: Tensor = file.get_tensor(name)
            if stored.dtype not in FLOATS:
                raise CheckpointError(f"tensor {name} has unsupported type {stored.dtype}")
            if self._is_transposed(name):
                stored = stored.transpose(1, 2)
            return stored.to(dtype).clone(memory_format=torch.contiguous_format)

    def _stored_shapes(self) -> dict[str, Shape]:
        by_file: dict[Path, list[str]] = {}
        for name, path in self._files.items():
            by_file.setdefault(path, []).append(name)
        shapes = {}
        for path, names in by_file.items():
            try:
                with safe_open(path, framework="pt") as file:
                    stored = set(file.keys())
                    for name in stored.intersection(names):
                        shapes[name] = tuple(file.get_slice(name).get_shape())
            except FileNotFoundError:
                raise CheckpointError(f"the weights file {path.name} is missing") from None
            except SafetensorError as error:
                raise CheckpointError(f"{path.name} cannot be read: {error}") from None
        return shapes

    def _check(self, expected: Mapping[str, Shape], config: TextConfig) -> None:
        text = {name for name in self._shapes if not name.startswith(VISION)}
        problems = []
        missing = sorted(expected.keys() - text)
        # A tied checkpoint may still contain the head; like transformers, ignore it.
        unexpected = sorted(text - expected.keys() - ({HEAD} if config.tied else set()))
        if missing:
            problems.append(f"missing: {_some(missing)}")
        if unexpected:
            problems.append(f"unexpected: {_some(unexpected)}")
        wrong = [
            f"{name} has {list(self._shapes[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in text
            and self._shapes[name] != (_swapped(shape) if self._is_transposed(name) else shape)
        ]
        if wrong:
            problems.append(f"wrong shape: {_some(wrong)}")
        if problems:
            raise CheckpointError(
                "the decoder's weights do not fit config.json; " + "; ".join(problems)
            )

    def _is_transposed(self, name: str) -> bool:
        """Whether expert tensors are stored as (E, D, 2I) and (E, I, D), as the published ones are.

        If sizes coincide, one of the two shapes may be ambiguous, but never both: D is the last
        axis of one tensor and the second axis of the other.
        """
        prefix, dot, kind = name.rpartition(".experts.")
        if not dot or kind not in ("gate_up_proj", "down_proj"):
            return False
        gate_up = self._shapes.get(f"{prefix}.experts.gate_up_proj", ())
        down = self._shapes.get(f"{prefix}.experts.down_proj", ())
        if len(gate_up) != 3 or len(down) != 3:
            return False
        return gate_up[1] == down[2] and gate_up[2] == 2 * down[1]


def _attention_shapes(config: TextConfig) -> dict[str, Shape]:
    size, d = config.hidden_size, config.head_dim
    query, key = config.num_heads * d, config.num_kv_heads * d
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (size,),
        "post_attention_layernorm.weight": (size,),
        "self_attn.q_norm.weight": (d,),
        "self_attn.k_norm.weight": (d,),
        "self_attn.q_proj.weight": (query, size),
        "self_attn.k_proj.weight": (key, size),
        "self_attn.v_proj.weight": (key, size),
        "self_attn.o_proj.weight": (size, query),
    }
    if config.attention_bias:
        shapes |= {
            "self_attn.q_proj.bias": (query,),
            "self_attn.k_proj.bias": (key,),
            "self_attn.v_proj.bias": (key,),
            "self_attn.o_proj.bias": (size,),
        }
    return shapes


def _mlp_shapes(config: TextConfig, moe: MoeConfig | None) -> dict[str, Shape]:
    size, wide = config.hidden_size, config.intermediate_size
    if moe is None:
        return {
            "mlp.gate_proj.weight": (wide, size),
            "mlp.up_proj.weight": (wide, size),
            "mlp.down_proj.weight": (size, wide),
        }
    return {
        "mlp.gate.weight": (moe.num_experts, size),
        "mlp.experts.gate_up_proj": (moe.num_experts, 2 * moe.intermediate_size, size),
        "mlp.experts.down_proj": (moe.num_experts, size, moe.intermediate_size),
    }


def _tensor_files(folder: Path) -> dict[str, Path]:
    index = folder / _INDEX
    if index.is_file():
        weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / Path(file).name for name, file in weight_map.items()}
    single = folder / _SINGLE
    if not single.is_file():
        raise CheckpointError(f"the folder has neither {_INDEX} nor {_SINGLE}")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except SafetensorError as error:
        raise CheckpointError(f"{_SINGLE} cannot be read: {error}") from None


def _swapped(shape: Shape) -> Shape:
    return (shape[0], shape[2], shape[1])


def _some(names: list[str], limit: int = 8) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
