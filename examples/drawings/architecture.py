"""The Qwen3-VL configuration of the drawings model and its initial weights.

Widths and vocabulary are multiples of 64 and head sizes are 128 (decoder) and 64 (vision tower):
attention and matrix kernels of serving engines are written for these.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

VOCAB_SIZE = 2048
MAX_POSITIONS = 4096
ROPE_THETA = 5_000_000.0
MROPE_SECTION = [24, 20, 20]
PATCH = 16
MERGE = 2
MIN_PIXELS = 160 * 256
MAX_PIXELS = 256 * 256
"""Area limits of the image processor: every image with an aspect ratio up to 2:1 lands on sides
of 160 to 320 pixels, the sizes seen in training (40 to 64 image tokens)."""

RESIDUAL_OUTPUTS = ("o_proj", "down_proj", "attn.proj", "mlp.linear_fc2")


def config(token_ids: dict[str, int]) -> Qwen3VLConfig:
    """Configuration for a tokenizer whose special tokens have these ids."""
    end_of_text, end_of_turn = token_ids["<|endoftext|>"], token_ids["<|im_end|>"]
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": ROPE_THETA,
            "mrope_section": MROPE_SECTION,
            "mrope_interleaved": True,
        },
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,
        "pad_token_id": end_of_text,
        "tie_word_embeddings": True,
    }
    vision = {
        "hidden_size": 128,
        "depth": 6,
        "num_heads": 2,
        "intermediate_size": 512,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "num_position_embeddings": 48 * 48,
        "out_hidden_size": 256,
        "deepstack_visual_indexes": [1, 3, 5],
        "in_channels": 3,
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def initial_model(model_config: Qwen3VLConfig, seed: int) -> Qwen3VLForConditionalGeneration:
    """A float32 model with fan-in initialisation; residual outputs start smaller."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(model_config).float()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            scale = 0.3 if name.endswith(RESIDUAL_OUTPUTS) else 1.0
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    width = model_config.text_config.hidden_size
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=width**-0.5)
    return model
