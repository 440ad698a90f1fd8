"""Tiny random Qwen3-VL checkpoints with the sizes that TurboMind's kernels ask for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tests.checkpoints import VOCAB, write_tokenizer

HIDDEN, HEAD, LAYERS, DEPTH, EXPERTS, EXPERT = 256, 128, 2, 3, 4, 128
"""EXPERT is half of HIDDEN: gate_up of an expert is square, its axes tell nothing about their order."""


@dataclass(frozen=True)
class EngineShape:
    """What differs between the checkpoints of the contract tests."""

    moe: bool = False
    tied: bool = True
    vision_head: int = 64
    intermediate: int = 192
    legacy: bool = False
    """config.json and axes of packed experts as transformers 4.57 and the published files have them."""

    @property
    def name(self) -> str:
        parts = ["moe" if self.moe else "dense", "tied" if self.tied else "untied"]
        parts += [f"head{self.vision_head}", f"mlp{self.intermediate}"]
        return "-".join([*parts, *(["legacy"] if self.legacy else [])])


def write_engine_checkpoint(folder: Path, shape: EngineShape) -> Path:
    """Write a whole random bfloat16 checkpoint, tokenizer and processor included."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder)
    config = _config(shape, vocab)
    torch.manual_seed(0)
    build = Qwen3VLMoeForConditionalGeneration if shape.moe else Qwen3VLForConditionalGeneration
    model = build(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
    model.tie_weights()
    model.save_pretrained(folder)
    _write_processor(folder)
    if shape.legacy:
        _make_legacy(folder)
    return folder


def _config(shape: EngineShape, vocab: dict[str, int]) -> Any:
    text: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": shape.intermediate, "head_dim": HEAD,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 4096, "tie_word_embeddings": shape.tied, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6,
                            "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    }  # fmt: skip
    if shape.moe:
        text |= {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT}
    vision = {
        "hidden_size": 2 * shape.vision_head, "depth": DEPTH, "num_heads": 2,
        "intermediate_size": 208, "num_position_embeddings": 36, "out_hidden_size": HIDDEN,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    kind = Qwen3VLMoeConfig if shape.moe else Qwen3VLConfig
    return kind(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=shape.tied,
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        vision_start_token_id=vocab["<|vision_start|>"],
        vision_end_token_id=vocab["<|vision_end|>"],
    )


def _write_processor(folder: Path) -> None:
    common = {
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "do_resize": True,
        "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    image = common | {
        "size": {"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
    }
    video = common | {
        "size": {"shortest_edge": 2 * 32 * 32, "longest_edge": 16 * 128 * 128},
        "video_processor_type": "Qwen3VLVideoProcessor",
        "processor_class": "Qwen3VLProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


def _make_legacy(folder: Path) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    text = content["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    if "num_local_experts" in text:
        text["num_experts"] = text.pop("num_local_experts")
        text["norm_topk_prob"] = True
    path.write_text(json.dumps(content))
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if ".experts." in name:
            weights[name] = weights[name].transpose(1, 2).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
