"""The prompt: ChatML turns by hand, with text that cannot forge special tokens.

The result is the same as that of the checkpoint's chat template for a system text and one user turn
whose pictures come first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lmdeploy_ext.packing import PackedImage, PackedRequest, pack
from service.engines.shared.config import CheckpointError, TextConfig
from service.engines.shared.detokenizer import token_bytes

TURN_BEGIN = "<|im_start|>"
TURN_END = "<|im_end|>"


class Chat:
    """Tokenizer of a checkpoint, and the turns around a request's texts.

    table: the bytes of every id up to the width of the logits, empty for special tokens.
    special_ids: ids that are never text.
    """

    def __init__(self, folder: Path, config: TextConfig) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError("tokenizer.json is missing")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more specific
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Special tokens inside a text are spelled out with ordinary tokens instead of recognised.
        self._tokenizer.encode_special_tokens = True
        self._config = config
        added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
        self.special_ids = frozenset(
            int(entry["id"]) for entry in added if entry.get("special")
        ) | frozenset(config.stop_ids)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.table = token_bytes(vocab, self.special_ids, config.vocab_size)
        self._check(vocab)
        begin, end = vocab[TURN_BEGIN], vocab[TURN_END]
        newline = self.encode("\n")
        self._user = [begin, *self.encode("user\n")]
        self._close = [end, *newline]
        self._assistant = [begin, *self.encode("assistant\n")]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special one."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def pack(self, system: str, user: str, images: Sequence[PackedImage]) -> PackedRequest:
        """The whole prompt of a request."""
        segments: list[Any] = []
        if system:
            segments.append([*self._begin("system\n", system), *self._close])
        if not images:
            segments.append(self._begin("user\n", user))
        else:
            segments.append(self._user)
            for image in images:
                segments += [[self._config.vision_start_id], image, [self._config.vision_end_id]]
            segments.append(self.encode(user))
        segments.append([*self._close, *self._assistant])
        return pack(segments, self._config.image_token_id)

    def _begin(self, role: str, text: str) -> list[int]:
        # Role and text are one run for the template's tokenizer: newlines may merge across them.
        return [self._user[0], *self.encode(role + text)]

    def _check(self, vocab: dict[str, int]) -> None:
        missing = [token for token in (TURN_BEGIN, TURN_END) if token not in vocab]
        if missing:
            raise CheckpointError(f"tokenizer.json lacks {', '.join(missing)}")
        if max(vocab.values()) >= self._config.vocab_size:
            raise CheckpointError(
                f"tokenizer.json has id {max(vocab.values())}, but the vocabulary of config.json "
                f"ends at {self._config.vocab_size}"
            )
