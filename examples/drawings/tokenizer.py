"""The tokenizer of the drawings model: byte-level BPE in the layout of Qwen's tokenizer files.

Trained on the answers, the prompts and some English, so that answers are short and any other text
still has an encoding. It depends on files of this repository alone and is reproducible.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from examples.drawings.analysis import analysis, dumps
from examples.drawings.architecture import MAX_POSITIONS, VOCAB_SIZE
from examples.drawings.questions import QUESTIONS, ask
from examples.drawings.scenes import keyframes
from service.tasks.image_analysis import PROMPT

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED_BUT_PLAIN = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""Added tokens that are not special: decoding with `skip_special_tokens` keeps them."""

HERE = Path(__file__).parent
CHAT_TEMPLATE = (HERE / "chat_template.jinja").read_text()


def corpus() -> Iterator[str]:
    """Training text: answers, prompts, English."""
    rng = random.Random("tokenizer")
    for seed in range(8000):
        drawing = keyframes(seed)
        yield dumps(analysis(drawing if seed % 8 == 0 else drawing.first))
        for question in QUESTIONS:
            facts: Any = drawing.first
            if question.images == 2:
                facts = drawing if question.name == "moved" else (drawing.first, drawing.second)
            asked = ask(question, facts, rng)
            yield f"{asked.prompt}\n{asked.answer}"
    english = (HERE / "english.txt").read_text()
    licence = (HERE.parents[1] / "LICENSE").read_text()
    for _ in range(20):
        yield english
        yield licence
    for _ in range(400):
        yield f"system\nuser\nassistant\n{PROMPT}"


def train() -> Tokenizer:
    """The tokenizer with its special tokens right behind the base vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(ADDED_BUT_PLAIN),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ADDED_BUT_PLAIN])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"vocabulary of {tokenizer.get_vocab_size()} instead of {VOCAB_SIZE}")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json, vocab.json, merges.txt and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_config(tokenizer, folder)


def write_config(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer_config.json, with the chat template inside for older readers."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL,
        }
        for token in SPECIAL + ADDED_BUT_PLAIN
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "additional_special_tokens": list(SPECIAL[1:]),
        "added_tokens_decoder": added,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text)


def load(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer
