"""Turns a conversation into a packed prompt of token ids, in which text cannot forge special
tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from lmdeploy_ext.families import PromptFormat
from lmdeploy_ext.packing import PackedImage, PackedRequest, pack
from service.engines.common import chat_template, qwen3_5_template
from service.engines.common.chat_template import TURN_BEGIN, TURN_END, Piece, Special, joined
from service.engines.common.config import CheckpointError, TextConfig
from service.engines.common.detokenizer import token_bytes
from service.types import Message, ToolDefinition

RENDERERS: Mapping[PromptFormat, Callable[..., Iterator[Piece]]] = {
    "qwen3-vl": chat_template.render,
    "qwen3.5": qwen3_5_template.render,
}


class Chat:
    """The tokenizer of a checkpoint; turns conversations into prompts.

    table: the bytes of every token id up to the width of the logits, empty for special tokens.
    special_ids: token ids that are never text.
    """

    def __init__(self, folder: Path, config: TextConfig) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError("tokenizer.json is missing")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers has no more specific exception
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # The text of a special token is encoded with ordinary tokens, not as the special token.
        self._tokenizer.encode_special_tokens = True
        self._config = config
        added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
        self.special_ids = frozenset(
            int(entry["id"]) for entry in added if entry.get("special")
        ) | frozenset(config.stop_ids)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.table = token_bytes(vocab, self.special_ids, config.vocab_size)
        self._check(vocab)
        self._turn_ids = {token: vocab[token] for token in (TURN_BEGIN, TURN_END)}

    def encode(self, text: str) -> list[int]:
        """The token ids of a text; never a special token."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def turns(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolDefinition] = (),
        *,
        constrained: bool = False,
        thinking: bool = False,
    ) -> list[list[int] | None]:
        """The prompt of a conversation as lists of token ids, with None for each image.

        constrained: whether a grammar constrains the answer. A grammar does not cover thoughts, so
            the prompt then ends with closed thoughts.
        thinking: whether the caller wants thoughts, for a family that leaves the choice to callers.
        """
        render = RENDERERS[self._config.family.prompt_format]
        prefix = self._config.answer_prefix(constrained=constrained, thinking=thinking)
        segments: list[list[int] | None] = []
        for piece in joined(render(messages, tools, prefix)):
            if isinstance(piece, str):
                segments.append(self.encode(piece))
            elif isinstance(piece, Special):
                segments.append([self._turn_ids[piece.token]])
            else:
                start, end = self._config.vision_start_id, self._config.vision_end_id
                segments += [[start], None, [end]]
        return segments

    def pack(
        self, turns: Sequence[list[int] | None], images: Sequence[PackedImage]
    ) -> PackedRequest:
        """Join the turns and the patches of the images into one packed prompt."""
        remaining = iter(images)
        segments = [next(remaining) if run is None else run for run in turns]
        return pack(segments, self._config.image_token_id)

    def _check(self, vocab: dict[str, int]) -> None:
        missing = [token for token in (TURN_BEGIN, TURN_END) if token not in vocab]
        if missing:
            raise CheckpointError(f"tokenizer.json lacks {', '.join(missing)}")
        if max(vocab.values()) >= self._config.vocab_size:
            raise CheckpointError(
                f"tokenizer.json has id {max(vocab.values())}, but the vocabulary of config.json "
                f"ends at {self._config.vocab_size}"
            )
