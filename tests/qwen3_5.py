"""Tiny random Qwen3.5 checkpoints, dense and with experts, in the sizes of TurboMind's kernels."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from tests.checkpoints import VOCAB, write_tokenizer

HIDDEN, LAYERS, VISION_DEPTH = 256, 4, 3
PROCESSOR = {
    "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "do_resize": True,
    "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
    "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
    "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor",
}  # fmt: skip

KERNELS = ("causal_conv1d_fn", "causal_conv1d_update", "torch_chunk_gated_delta_rule",
           "torch_recurrent_gated_delta_rule")  # fmt: skip


def compute_in_torch() -> None:
    """Let transformers compute recurrent layers in torch: it prefers kernels of packages that come
    with LMDeploy, and these need a GPU."""
    for module in (modeling_qwen3_5, modeling_qwen3_5_moe):
        for name in KERNELS:
            setattr(module, name, inspect.unwrap(getattr(module, name)))


compute_in_torch()


def write_config(
    folder: Path, *, moe: bool = False, tied: bool = True, vision_head: int = 64, **text: Any
) -> Any:
    """Write everything but the weights, and return the configuration.

    text: fields of text_config to change; None takes a field away from the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "max_position_embeddings": 4096, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                            "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
                            "mrope_interleaved": True},
    }  # fmt: skip
    if moe:
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
                  "shared_expert_intermediate_size": 128}  # fmt: skip
    else:
        sizes["intermediate_size"] = 384
    vision = {
        "hidden_size": 2 * vision_head, "depth": VISION_DEPTH, "num_heads": 2,
        "intermediate_size": 208, "num_position_embeddings": 36, "out_hidden_size": HIDDEN,
    }  # fmt: skip
    config = (Qwen3_5MoeConfig if moe else Qwen3_5Config)(
        text_config=sizes,
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        vision_start_token_id=vocab["<|vision_start|>"],
        vision_end_token_id=vocab["<|vision_end|>"],
    )
    config.architectures = [f"Qwen3_5{'Moe' * moe}ForConditionalGeneration"]
    config.save_pretrained(folder)
    change_config(folder, **{"mamba_ssm_dtype": "float32", **text})
    ends = {"eos_token_id": [vocab["<|im_end|>"], vocab["<|endoftext|>"]]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return config


def change_config(folder: Path, **text: Any) -> None:
    """Change fields of text_config in the file; None takes a field away."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    changed = {**content["text_config"], **text}
    content["text_config"] = {key: value for key, value in changed.items() if value is not None}
    path.write_text(json.dumps(content))


def write_qwen3_5(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    moe: bool = False,
    **config: Any,
) -> Path:
    """Write a whole random checkpoint. config: see `write_config`."""
    made = write_config(folder, moe=moe, dtype=str(dtype)[6:], **config)
    build = Qwen3_5MoeForConditionalGeneration if moe else Qwen3_5ForConditionalGeneration
    torch.manual_seed(seed)
    content = (folder / "config.json").read_text()
    generation = (folder / "generation_config.json").read_text()
    build(made).to(dtype).save_pretrained(folder)
    (folder / "config.json").write_text(content)
    (folder / "generation_config.json").write_text(generation)
    clarify(folder, seed)
    return folder


def clarify(folder: Path, seed: int) -> None:
    """Give the weights sizes with which every layer affects the tokens, and rounding hardly does."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    source = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        values = torch.randn(weight.shape, generator=source)
        if name.endswith("linear_attn.norm.weight") or ("norm" in name and ".visual." in name):
            values = torch.rand(weight.shape, generator=source)
            values = values + 0.5 if name.endswith("weight") else 0.2 * values
        elif "norm" in name:  # these weights are added to 1
            values = torch.rand(weight.shape, generator=source) - 0.5
        elif name.endswith("A_log"):  # some heads forget at once, others remember the whole prompt
            values = torch.linspace(-5, 0, weight.numel())
        elif "pos_embed" in name:
            pass  # as large as what the patches give
        elif weight.dim() == 1:
            values *= 0.2
        else:
            width = weight.shape[-1] if ".experts." in name else weight[0].numel()
            values *= 1.2 / width**0.5
        weights[name] = values.to(weight.dtype)
    save_file(weights, path, {"format": "pt"})
