"""Tiny random checkpoints in the sizes that TurboMind's kernels accept, with clear answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from tests.checkpoints import VOCAB, write_tokenizer
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape, write_engine_checkpoint


def write_text_checkpoint(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Write a random Qwen3 checkpoint with its tokenizer.

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
    end = vocab["<|im_end|>"]
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=vocab["<|endoftext|>"], do_sample=False
    )
    model.to(dtype).save_pretrained(folder)
    clarify(folder, seed)
    return folder


def write_vision_checkpoint(folder: Path, shape: EngineShape, seed: int = 0) -> Path:
    """Write a random Qwen3-VL checkpoint, DeepStack and all."""
    write_engine_checkpoint(folder, shape)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    # With a small base also the slow pairs of a head turn within a short prompt.
    content["text_config"]["rope_parameters"]["rope_theta"] = 100.0
    path.write_text(json.dumps(content))
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {entry["content"]: entry["id"] for entry in added}
    ends = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    clarify(folder, seed)
    return folder


def clarify(folder: Path, seed: int) -> None:
    """Give the weights sizes with which every layer matters and a greedy token is decided by the
    model and not by rounding."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    source = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        values = torch.randn(weight.shape, generator=source)
        if "norm" in name and name.endswith("weight"):
            values = torch.rand(weight.shape, generator=source) + 0.5
        elif "pos_embed" in name:
            pass  # as large as what the patches give
        elif weight.dim() == 1:
            values *= 0.2
        else:
            values *= (
                1.2 / weight[0].numel() ** 0.5
                if weight.dim() != 3
                else 1.2 / weight.shape[-1] ** 0.5
            )
        weights[name] = values.to(weight.dtype)
    save_file(weights, path, {"format": "pt"})


def image_token(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["image_token_id"])
