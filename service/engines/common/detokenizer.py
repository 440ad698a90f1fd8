"""From token ids back to text, as they come, without ever splitting a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence

THOUGHTS_END = "</think>"


def byte_alphabet() -> dict[str, int]:
    """The byte of each of the 256 characters in which byte-level BPE spells its tokens (GPT-2)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in set(kept)]
    alphabet = {chr(byte): byte for byte in kept}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(shifted)})
    return alphabet


def token_bytes(vocab: Mapping[str, int], special: Iterable[int], size: int) -> tuple[bytes, ...]:
    """The bytes that each id stands for; empty for special tokens and ids without a token.

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
            table[index] = token.encode()  # an added token, which is spelled as it reads
    return tuple(table)


class Detokenizer:
    """Text of one answer. An incomplete character is held back until its last byte has come.

    thinks: the answer begins inside the thoughts of a Thinking edition. Thoughts are not part of the
    answer: nothing is given out up to ``</think>`` and the newlines behind it.
    """

    def __init__(self, table: Sequence[bytes], *, thinks: bool = False) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._thinks = thinks
        self._at_start = thinks
        self._tail = ""

    def feed(self, token: int) -> str:
        """The characters that this token completes; often its text, sometimes nothing."""
        return self._spoken(self._decoder.decode(self._table[token]))

    def finish(self) -> str:
        """What is left at the end: a replacement character for a cut one, else nothing."""
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
