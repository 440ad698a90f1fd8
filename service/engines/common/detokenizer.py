"""Converts token ids to text one by one, without splitting a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence

THOUGHTS_END = "</think>"


def byte_alphabet() -> dict[str, int]:
    """Maps each of the 256 characters of byte-level BPE (GPT-2) to its byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in set(kept)]
    alphabet = {chr(byte): byte for byte in kept}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(shifted)})
    return alphabet


def token_bytes(vocab: Mapping[str, int], special: Iterable[int], size: int) -> tuple[bytes, ...]:
    """The bytes of each token id; empty for special tokens and ids without a token.

    ``size`` is the width of the logits, which may exceed the vocabulary.
    """
    alphabet = byte_alphabet()
    table = [b""] * size
    hidden = set(special)
    for token, index in vocab.items():
        if index >= size or index in hidden:
            continue
        if all(character in alphabet for character in token):
            table[index] = bytes(alphabet[character] for character in token)
        else:
            table[index] = token.encode()  # an added token is stored as plain text
    return tuple(table)


class Detokenizer:
    """Decodes the text of one answer. An incomplete character is held back until its last byte
    arrives.

    thinks: the answer begins with the thoughts of a Thinking edition. Thoughts are not part of the
    answer: everything up to ``</think>`` and the following newlines is left out.
    """

    def __init__(self, table: Sequence[bytes], *, thinks: bool = False) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._thinks = thinks
        self._at_start = thinks
        self._tail = ""

    def feed(self, token: int) -> str:
        """Add a token; returns the characters that it completes, possibly none."""
        return self._spoken(self._decoder.decode(self._table[token]))

    def finish(self) -> str:
        """End the text; returns a replacement character for an incomplete character, else an empty
        text."""
        return self._spoken(self._decoder.decode(b"", final=True))

    def _spoken(self, text: str) -> str:
        """The part of the text that belongs to the answer."""
        if self._thinks:
            self._tail += text
            _, end, text = self._tail.partition(THOUGHTS_END)
            if not end:
                self._tail = self._tail[1 - len(THOUGHTS_END) :]
                return ""
            self._thinks = False
        if self._at_start:
            text = text.lstrip("\n")
            self._at_start = not text
        return text
