"""Checkpoints with the widths of Qwen3-VL-2B or 8B, few or all layers, and random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "chat_template.jinja", "preprocessor_config.json",
                   "video_preprocessor_config.json")  # fmt: skip


WIDTHS = {
    "2B": (
        {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16},
        {"hidden_size": 1024, "intermediate_size": 4096},
    ),
    "8B": (
        {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32},
        {"hidden_size": 1152, "intermediate_size": 4304},
    ),
}
"""Of the decoder and of the vision tower."""


def write_random_model(folder: Path, like: Path, layers: int, size: str = "2B") -> Path:
    """Write a bfloat16 checkpoint with the tokenizer and the special ids of another one.

    layers: decoder layers, and vision blocks; Qwen3-VL-2B has 28 and 24, 8B 36 and 27. The logits
    have the full width of 151,936, far more than the tokenizer has tokens. size: of `WIDTHS`.
    """
    text, vision = WIDTHS[size]
    tied = size == "2B"
    special = json.loads((like / "config.json").read_text())
    deepstack = sorted({layers // 3, layers // 2, layers - 1})
    config = Qwen3VLConfig(
        text_config={
            **text, "vocab_size": 151_936, "num_hidden_layers": layers, "num_key_value_heads": 8,
            "head_dim": 128, "max_position_embeddings": 4096, "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0,
                                "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        vision_config={
            **vision, "depth": layers, "num_heads": 16,
            "out_hidden_size": text["hidden_size"], "deepstack_visual_indexes": deepstack,
        },
        tie_word_embeddings=tied,
        **{name: special[name] for name in ("image_token_id", "video_token_id",
                                            "vision_start_token_id", "vision_end_token_id")},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).to(torch.bfloat16)
    ends = json.loads((like / "generation_config.json").read_text())
    model.generation_config = GenerationConfig(
        eos_token_id=ends["eos_token_id"], pad_token_id=ends["pad_token_id"]
    )
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (like / name).is_file():
            shutil.copy(like / name, folder / name)
    return folder
