"""What TurboMind must hold for a Qwen3-VL checkpoint: tensors and configurations, from its files.

Written down from TurboMind's layout and independent of the source models: matrices are (in, out),
rotary dimensions are adjacent pairs, q, k and v are side by side, gate and up interleave in blocks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

KERNEL_HEAD = {64: 64, 72: 128}
"""Head size of the vision tower -> the one of TurboMind's kernel, padded with zeros."""


@dataclass
class GateUp:
    """gate and up of one MLP, each (I, D): TurboMind holds them interleaved in blocks of columns."""

    gate: torch.Tensor
    up: torch.Tensor

    def blocks(self, held: torch.Tensor) -> list[int]:
        """Every width of block with which ``held`` (D, 2·I') is this pair, padded with zeros."""
        columns = held.shape[1] // 2
        wanted = []
        for one in (self.gate, self.up):
            padded = torch.zeros(held.shape[0], columns, dtype=one.dtype)
            padded[:, : one.shape[0]] = one.T
            wanted.append(padded)
        return [
            width
            for width in range(1, columns + 1)
            if columns % width == 0 and torch.equal(held, _interleave(*wanted, width))
        ]


def _interleave(gate: torch.Tensor, up: torch.Tensor, width: int) -> torch.Tensor:
    pairs = zip(gate.split(width, dim=1), up.split(width, dim=1), strict=True)
    return torch.cat([block for pair in pairs for block in pair], dim=1)


def swapped(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix as (in, out); a vector as it is."""
    return tensor.T if tensor.dim() == 2 else tensor


def adjacent(rows: torch.Tensor, head: int) -> torch.Tensor:
    """Rotary halves of each head (rows ``i`` and ``i + head/2``) as neighbours."""
    lower, upper = rows.unflatten(0, (-1, 2, head // 2)).unbind(1)
    return torch.stack([lower, upper], dim=2).flatten(0, 2)


def padded_heads(rows: torch.Tensor, head: int) -> torch.Tensor:
    """Each head's rows with zeros up to the kernel's head size."""
    wide = KERNEL_HEAD[head]
    split = rows.unflatten(0, (-1, head))
    result = torch.zeros(split.shape[0], wide, *split.shape[2:], dtype=rows.dtype)
    result[:, :head] = split
    return result.flatten(0, 1)


@dataclass
class Expected:
    """Expectation for one checkpoint.

    Attributes:
        tensors: path in the engine's module tree -> tensor, or the pair that is interleaved there.
        used: names of the checkpoint's tensors that went into them.
    """

    folder: Path
    tensors: dict[str, torch.Tensor | GateUp] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        self.file = load_file(self.folder / "model.safetensors")
        self._text()
        self._vision()

    def take(self, name: str) -> torch.Tensor:
        self.used.add(name)
        return self.file[name]

    def _text(self) -> None:
        text, there = self.config["text_config"], "model.language_model"
        embedding = self.take(f"{there}.embed_tokens.weight")
        head = embedding if self.config["tie_word_embeddings"] else self.take("lm_head.weight")
        self.tensors["text_model.tok_embeddings"] = embedding
        self.tensors["text_model.output.weight"] = head.T
        self.tensors["text_model.norm.weight"] = self.take(f"{there}.norm.weight")
        for layer in range(text["num_hidden_layers"]):
            self._layer(f"text_model.layers.{layer}", f"{there}.layers.{layer}", text)

    def _layer(self, here: str, there: str, text: dict[str, Any]) -> None:
        head = text["head_dim"]
        q, k, v, o = (self.take(f"{there}.self_attn.{x}_proj.weight") for x in "qkvo")
        qkv = torch.cat([adjacent(q, head), adjacent(k, head), v])
        self.tensors |= {
            f"{here}.attention.w_qkv.weight": qkv.T,
            f"{here}.attention.wo.weight": o.T,
            f"{here}.attention_norm.weight": self.take(f"{there}.input_layernorm.weight"),
            f"{here}.ffn_norm.weight": self.take(f"{there}.post_attention_layernorm.weight"),
        }
        for x in "qk":
            norm = self.take(f"{there}.self_attn.{x}_norm.weight")
            self.tensors[f"{here}.attention.{x}_norm.weight"] = adjacent(norm, head)
        if f"{there}.mlp.gate.weight" in self.file:
            self._experts(f"{here}.moe_ffn", f"{there}.mlp", text)
        else:
            gate, up, down = (
                self.take(f"{there}.mlp.{x}_proj.weight") for x in ("gate", "up", "down")
            )
            self.tensors[f"{here}.feed_forward.w1w3.weight"] = GateUp(gate, up)
            self.tensors[f"{here}.feed_forward.w2.weight"] = down.T

    def _experts(self, here: str, there: str, text: dict[str, Any]) -> None:
        self.tensors[f"{here}.gate.weight"] = self.take(f"{there}.gate.weight").T
        gate_up = self.take(f"{there}.experts.gate_up_proj")
        down = self.take(f"{there}.experts.down_proj")
        # As transformers: (E, 2I, D) and (E, D, I); the published files have the axes swapped.
        if "rope_scaling" in text:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        for expert in range(len(gate_up)):
            gate, up = gate_up[expert].chunk(2)
            self.tensors[f"{here}.experts.{expert}.w1w3.weight"] = GateUp(gate, up)
            self.tensors[f"{here}.experts.{expert}.w2.weight"] = down[expert].T

    def _vision(self) -> None:
        here, there = "vision_model", "model.visual"
        patches = self.take(f"{there}.patch_embed.proj.weight")
        self.tensors[f"{here}.pos_embed"] = self.take(f"{there}.pos_embed.weight")
        self.tensors[f"{here}.patch_embed.weight"] = patches.flatten(1).T
        self.tensors[f"{here}.patch_embed.bias"] = self.take(f"{there}.patch_embed.proj.bias")
        self._copy(f"{here}.merger_norm", f"{there}.merger.norm")
        for name in ("fc1", "fc2"):
            self._copy(f"{here}.merger_{name}", f"{there}.merger.linear_{name}")
        for block in range(self.config["vision_config"]["depth"]):
            self._block(f"{here}.blocks.{block}", f"{there}.blocks.{block}")

    def _block(self, here: str, there: str) -> None:
        vision = self.config["vision_config"]
        head = vision["hidden_size"] // vision["num_heads"]
        for kind in ("weight", "bias"):
            q, k, v = self.take(f"{there}.attn.qkv.{kind}").chunk(3)
            parts = [padded_heads(x, head) for x in (adjacent(q, head), adjacent(k, head), v)]
            self.tensors[f"{here}.attention.w_qkv.{kind}"] = swapped(torch.cat(parts))
        out = self.take(f"{there}.attn.proj.weight")
        self.tensors[f"{here}.attention.wo.weight"] = padded_heads(out.T, head)
        self.tensors[f"{here}.attention.wo.bias"] = self.take(f"{there}.attn.proj.bias")
        for name in ("norm1", "norm2"):
            self._copy(f"{here}.{name}", f"{there}.{name}")
        for name in ("fc1", "fc2"):
            self._copy(f"{here}.mlp_{name}", f"{there}.mlp.linear_{name}")

    def _copy(self, here: str, there: str) -> None:
        self.tensors[f"{here}.weight"] = swapped(self.take(f"{there}.weight"))
        self.tensors[f"{here}.bias"] = self.take(f"{there}.bias")


def f32(value: float) -> float:
    """The number as C++ keeps it."""
    return float(np.float32(value))


TYPE = {"data_type": "DataType.TYPE_BF16"}
ALONE = {"tp_rank": 0, "tp_size": 1}
NO_MLA = {"kv_lora_rank": 0, "q_lora_rank": 0, "qk_nope_dim": 0, "qk_rope_dim": 0, "v_head_dim": 0}
PLAIN_ROPE = {
    "base": 10000.0, "dim": 0, "factor": 1.0, "max_position_embeddings": 0, "type": 0,
    "mrope_interleaved": False, "mrope_section": [0, 0, 0], "yarn_attention_factor": 1.0,
    "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "llama3_high_freq_factor": 4.0,
    "llama3_low_freq_factor": 1.0, "llama3_original_max_position_embeddings": 0,
}  # fmt: skip


def expected_configs(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Path of a module -> every field of its C++ configuration, for modules that are no matrix."""
    text, vision = config["text_config"], config["vision_config"]
    size = text["hidden_size"]
    found: dict[str, dict[str, Any]] = {
        "text_model": TYPE | ALONE | {"module_type": "ModelWeight", "hidden_units": size},
        "text_model.norm": _norm(size, text),
        "text_model.layers": {"module_type": "ModuleList"},
    }
    for layer in range(text["num_hidden_layers"]):
        here = f"text_model.layers.{layer}"
        found[here] = {"module_type": "DecoderLayerWeight"}
        found[f"{here}.attention"] = _attention(text)
        for name in ("attention_norm", "ffn_norm"):
            found[f"{here}.{name}"] = _norm(size, text)
        for name in ("q_norm", "k_norm"):
            found[f"{here}.attention.{name}"] = _norm(text["head_dim"], text)
        found |= _mlp(here, text)
    return found | _tower(vision)


def _norm(dim: int, text: dict[str, Any]) -> dict[str, Any]:
    eps = f32(text["rms_norm_eps"])
    return TYPE | {"module_type": "NormWeight", "dim": dim, "norm_eps": eps, "zero_centered": False}


def _attention(text: dict[str, Any]) -> dict[str, Any]:
    rope = text.get("rope_parameters") or text | text["rope_scaling"]
    section = rope["mrope_section"]
    return TYPE | ALONE | NO_MLA | {
        "module_type": "AttentionWeight", "causal": True, "output_gate": False, "window_size": 0,
        "use_logn_attn": False, "softmax_scale": 0.0, "hidden_dim": text["hidden_size"],
        "head_dim": text["head_dim"], "head_num": text["num_attention_heads"],
        "kv_head_num": text["num_key_value_heads"],
        "rope": PLAIN_ROPE | {
            "type": 1, "base": rope["rope_theta"], "dim": text["head_dim"],
            "max_position_embeddings": text["max_position_embeddings"],
            "mrope_section": section, "mrope_interleaved": True,
        },
    }  # fmt: skip


def _mlp(here: str, text: dict[str, Any]) -> dict[str, dict[str, Any]]:
    ffn = TYPE | ALONE | {"module_type": "FfnWeight", "act_type": 0}
    ffn |= {"hidden_dim": text["hidden_size"]}
    experts = text.get("num_local_experts") or text.get("num_experts")
    if not experts:
        sizes = {"inter_size": text["intermediate_size"], "is_expert": False}
        return {f"{here}.feed_forward": ffn | sizes}
    moe = TYPE | {
        "module_type": "MoeWeight", "act_type": 0, "fuse_silu": True, "ep_rank": 0, "ep_size": 1,
        "expert_num": experts, "experts_per_token": text["num_experts_per_tok"],
        "norm_topk_prob": True, "scoring_func": "softmax", "topk_method": "greedy",
        "n_group": 1, "topk_group": 1, "router_n_groups": 0, "routed_scale": 1.0,
    }  # fmt: skip
    found = {f"{here}.moe_ffn": moe, f"{here}.moe_ffn.experts": {"module_type": "ModuleList"}}
    sizes = {"inter_size": text["moe_intermediate_size"], "is_expert": True}
    return found | {f"{here}.moe_ffn.experts.{expert}": ffn | sizes for expert in range(experts)}


def _tower(vision: dict[str, Any]) -> dict[str, dict[str, Any]]:
    size, heads, eps = vision["hidden_size"], vision["num_heads"], {"norm_eps": f32(1e-6)}
    head = size // heads
    padded = KERNEL_HEAD[head]
    norm = TYPE | eps | {"module_type": "LayerNormWeight", "dim": size}
    attention = TYPE | ALONE | NO_MLA | {
        "module_type": "AttentionWeight", "causal": False, "output_gate": False, "window_size": 0,
        "use_logn_attn": False, "hidden_dim": size, "head_dim": padded, "head_num": heads,
        "kv_head_num": heads, "softmax_scale": f32(head**-0.5) if padded != head else 0.0,
        "rope": PLAIN_ROPE,
    }  # fmt: skip
    block = TYPE | eps | {
        "module_type": "QwenVitBlockWeight", "hidden_dim": size, "head_num": heads,
        "intermediate_size": vision["intermediate_size"],
    }  # fmt: skip
    found = {
        "vision_model": TYPE | eps | {
            "module_type": "QwenVitWeight", "depth": vision["depth"], "head_num": heads,
            "hidden_dim": size, "intermediate_size": vision["intermediate_size"],
            "out_hidden_dim": vision["out_hidden_size"], "in_channels": 3, "patch_size": 16,
            "temporal_patch_size": 2, "patch_in_dim": 3 * 2 * 16 * 16, "spatial_merge_size": 2,
            "num_position_embeddings": vision["num_position_embeddings"],
            "gelu_tanh": True, "gated_mlp": False, "norm_type": "NormType.LAYER_NORM",
            "use_window_attention": False, "window_size": 0, "fullatt_block_indexes": [],
        },
        "vision_model.merger_norm": norm,
        "vision_model.blocks": {"module_type": "ModuleList"},
    }  # fmt: skip
    for index in range(vision["depth"]):
        here = f"vision_model.blocks.{index}"
        found |= {here: block, f"{here}.attention": attention}
        found |= {f"{here}.norm1": norm, f"{here}.norm2": norm}
    return found
