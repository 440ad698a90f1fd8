"""From token ids back to text, as they come, without ever splitting a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence


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
    """Text of one answer. An incomplete character is held back until its last byte has come."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that this token completes; often its text, sometimes nothing."""
        return self._decoder.decode(self._table[token])

    def finish(self) -> str:
        """What is left at the end: a replacement character for a cut one, else nothing."""
        return self._decoder.decode(b"", final=True)
