"""Tiny random Qwen3-VL checkpoints, with a tokenizer, as transformers writes them.

The weights are random, but large enough that logits differ clearly: a greedy token is then decided
by the model and not by rounding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    GenerationConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>")  # fmt: skip
TEXT_TOKENS = ("<think>", "</think>")
VOCAB = 512
"""Width of the logits; the tokenizer has fewer tokens, as the published ones have."""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@dataclass(frozen=True)
class Shape:
    """What differs between the checkpoints of the tests."""

    moe: bool = False
    tied: bool = True
    vision_head: int = 64
    kv_heads: int = 1
    dtype: torch.dtype = torch.float32
    legacy: bool = False
    """Files as older transformers wrote them: rope_scaling, experts with swapped axes."""

    @property
    def name(self) -> str:
        parts = ["moe" if self.moe else "dense", "tied" if self.tied else "untied"]
        parts += [f"vision{self.vision_head}", f"kv{self.kv_heads}", str(self.dtype)[6:]]
        return "-".join([*parts, *(["legacy"] if self.legacy else [])])


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Train and write a small byte-level tokenizer in Qwen's layout; returns its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    base = VOCAB - 32 - len(SPECIAL) - len(TEXT_TOKENS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ("the colour of a large red circle is blue and its position left right top bottom",
             '{"scene": "indoor", "objects": [{"shape": "square", "count": 3}], "ok": true}',
             "system user assistant describe picture answer none café naïve 日本語 😀")  # fmt: skip
    tokenizer.train_from_iterator(
        [line for line in words for _ in range(4)],
        BpeTrainer(vocab_size=base, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in TEXT_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    vocab: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return vocab


def write_checkpoint(folder: Path, shape: Shape = Shape(), seed: int = 0) -> Path:
    """Write a whole random checkpoint into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder)
    model = _model(shape, vocab, seed)
    model.to(shape.dtype).save_pretrained(folder)
    limits = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    processor = {
        "size": limits, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "do_rescale": True,
        "do_normalize": True, "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255,
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    if shape.legacy:
        _make_legacy(folder)
    return folder


def _model(shape: Shape, vocab: dict[str, int], seed: int) -> Any:
    text: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": shape.kv_heads, "head_dim": 16,
        "max_position_embeddings": 1024, "tie_word_embeddings": shape.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                            "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    }  # fmt: skip
    if shape.moe:
        text |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    ids = {
        "image_token_id": vocab["<|image_pad|>"],
        "video_token_id": vocab["<|video_pad|>"],
        "vision_start_token_id": vocab["<|vision_start|>"],
        "vision_end_token_id": vocab["<|vision_end|>"],
    }
    vision = {
        "hidden_size": 2 * shape.vision_head, "depth": 4, "num_heads": 2, "intermediate_size": 96,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "num_position_embeddings": 36, "out_hidden_size": 48,
        "deepstack_visual_indexes": [0, 1, 3],
    }  # fmt: skip
    kind = Qwen3VLMoeConfig if shape.moe else Qwen3VLConfig
    config = kind(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied, **ids)
    torch.manual_seed(seed)
    build = Qwen3VLMoeForConditionalGeneration if shape.moe else Qwen3VLForConditionalGeneration
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                fan = parameter.shape[-1] if parameter.dim() > 1 else 16
                parameter.normal_(0, 1.2 / fan**0.5 if parameter.dim() > 1 else 0.2)
        model.tie_weights()
    model.generation_config = GenerationConfig(
        eos_token_id=[vocab["<|im_end|>"], vocab["<|endoftext|>"]],
        pad_token_id=vocab["<|endoftext|>"],
        do_sample=False,
    )
    return model


def _make_legacy(folder: Path) -> None:
    """Rewrite the configuration with the keys and the experts with the axes of transformers 4.57."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    text = content["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    path.write_text(json.dumps(content))
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if ".experts." in name:
            weights[name] = weights[name].transpose(1, 2).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
