"""Narrows masks of a vocabulary by the limits of strings.

What a token adds to a string depends on the token and on the state of the string's escapes alone. So the
characters of all tokens are counted once for each such state, and a mask for each number of characters
that is left is made when it is first needed. Only tokens that touch two strings are followed one by one,
where the grammar allows them.

Letters: V tokens of the vocabulary; W = ceil(V / 32) words of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lmdeploy_ext.lengths.follower import STEPS, Follower, Lex, Mode

Words = NDArray[np.int32]
_NEXT = np.array([[following for following, _ in row] for row in STEPS], dtype=np.int8)
_BEGUN = np.array([[begun for _, begun in row] for row in STEPS], dtype=np.int16)


class Vocabulary:
    """The tokens of a model as bytes, empty for tokens that are never text."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens
        self._sizes = np.array([len(token) for token in tokens], dtype=np.int64)
        self._counts: dict[int, tuple[NDArray[np.int16], NDArray[np.bool_]]] = {}
        self._fitting: dict[int, Words] = {}
        quotes = np.array([token.count(b'"') for token in tokens], dtype=np.int64)
        self._several = np.flatnonzero(quotes >= 2)
        opening = np.flatnonzero(quotes == 1).tolist()
        self._leading = _Openers([i for i in opening if tokens[i][:1] == b'"'], tokens)
        self._inner = _Openers([i for i in opening if tokens[i][:1] != b'"'], tokens)

    def narrow_inplace(self, words: Words, follower: Follower) -> None:
        """Clear the bits of tokens with which a string would become too long, or be closed too short.

        words: int32 (W,), the mask of the grammar.
        """
        if follower.mode is Mode.STRING:
            self._narrow_string(words, follower)
        elif follower.mode is Mode.OUTSIDE:
            if not follower.is_naming:
                most = follower.table.states[follower.here].maximum
                _clear(words, self._leading.longer_than(most))
            self._follow(words, self._inner.longer_than(follower.table.least_maximum), follower)
        self._follow(words, self._several, follower)

    def _narrow_string(self, words: Words, follower: Follower) -> None:
        left, need = follower.left, follower.need
        widths, closes = self._counted(follower.lex)
        if left < self._longest:
            if follower.lex == Lex.PLAIN:
                fitting = self._fitting.get(left)
                if fitting is None:
                    fitting = self._fitting[left] = _packed(widths <= left)
                words &= fitting
            else:
                words &= _packed(widths <= left)
        if need > 0:
            words &= _packed(~closes | (widths >= need))

    def _follow(self, words: Words, indices: NDArray[np.int64], follower: Follower) -> None:
        allowed = indices[(words[indices >> 5] >> (indices & 31).astype(np.int32)) & 1 != 0]
        for index in allowed.tolist():
            if not follower.fits(self.tokens[index]):
                words[index >> 5] &= ~np.array([1 << (index & 31)], dtype=np.uint32).view(np.int32)[
                    0
                ]

    @cached_property
    def _longest(self) -> int:
        """The most characters of a token, in any state."""
        return int(self._sizes.max(initial=0))

    def _counted(self, lex: int) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
        """By token: the characters that begin in it before the string closes, and whether it closes."""
        found = self._counts.get(lex)
        if found is None:
            found = self._counts[lex] = self._count(lex)
        return found

    def _count(self, lex: int) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
        order = np.argsort(-self._sizes, kind="stable")
        sizes = self._sizes[order]
        starts = np.cumsum(sizes) - sizes
        data = np.frombuffer(b"".join(self.tokens[index] for index in order), np.uint8)
        states = np.full(len(order), lex, dtype=np.int8)
        widths = np.zeros(len(order), dtype=np.int16)
        for position in range(int(sizes.max(initial=0))):
            live = int(np.searchsorted(-sizes, -position))  # the tokens with more bytes
            now, read = states[:live], data[starts[:live] + position]
            widths[:live] += _BEGUN[now, read]
            states[:live] = _NEXT[now, read]
        found = np.empty_like(widths), np.empty(len(order), dtype=np.bool_)
        found[0][order], found[1][order] = widths, states == Lex.CLOSED
        return found


class _Openers:
    """Tokens with one quote, by falling number of characters behind it."""

    def __init__(self, indices: list[int], tokens: Sequence[bytes]) -> None:
        behind = [_characters(tokens[index].partition(b'"')[2]) for index in indices]
        order = np.argsort(-np.array(behind, dtype=np.int64), kind="stable")
        self._tokens = np.array(indices, dtype=np.int64)[order]
        self._behind = -np.array(behind, dtype=np.int64)[order]

    def longer_than(self, characters: int) -> NDArray[np.int64]:
        """The tokens with more characters behind the quote."""
        return self._tokens[: int(np.searchsorted(self._behind, -characters))]


def _characters(data: bytes) -> int:
    """The characters that begin in the bytes of a string."""
    state, count = int(Lex.PLAIN), 0
    for byte in data:
        state, begun = STEPS[state][byte]
        count += begun
    return count


def _clear(words: Words, indices: NDArray[np.int64]) -> None:
    bits = np.left_shift(np.uint32(1), (indices & 31).astype(np.uint32))
    np.bitwise_and.at(words.view(np.uint32), indices >> 5, ~bits)


def _packed(bits: NDArray[np.bool_]) -> Words:
    """bool (V,) as int32 (W,); bits beyond V are set."""
    padded = np.ones(-(-len(bits) // 32) * 32, dtype=np.bool_)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view(np.int32)
