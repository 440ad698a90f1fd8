"""Tiny random text checkpoints in the sizes that TurboMind's kernels accept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from tests.checkpoints import VOCAB, write_tokenizer


def write_text_checkpoint(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Write a random Qwen3 checkpoint with its tokenizer.

    The weights are large enough that a greedy token is decided by the model and not by rounding.

    Args:
        changes: fields of ``Qwen3Config``. Heads must stay 128 wide, other sizes multiples of 64.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
        "max_position_embeddings": 2048, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**{**sizes, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
        model.tie_weights()
    end = vocab["<|im_end|>"]
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=vocab["<|endoftext|>"], do_sample=False
    )
    model.to(dtype).save_pretrained(folder)
    return folder
