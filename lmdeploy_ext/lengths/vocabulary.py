"""Narrows masks of a vocabulary by the limits of strings.

What a token adds to a string depends on the token and on the state of the string's escapes alone. So the
characters of all tokens are counted once for each such state, and a mask for each number of characters
that is left is made when it is first needed. Tokens are followed one by one only where that does not
say enough, and where the grammar allows them:

- a token that begins another string, with more characters than the table allows everywhere, or that also
  ends that string;
- tokens near the end of a text that cannot end everywhere.

Letters: V tokens of the vocabulary; W = ceil(V / 32) words of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lmdeploy_ext.lengths.follower import STEPS, Follower, Lex, Mode
from lmdeploy_ext.lengths.table import NONE, Table

Words = NDArray[np.int32]
Indices = NDArray[np.int64]
_NEXT = np.array([[following for following, _ in row] for row in STEPS], dtype=np.int8)
_BEGUN = np.array([[begun for _, begun in row] for row in STEPS], dtype=np.int16)
_NEVER = 2**31 - 1
_MOST_KEPT = 1024
"""Masks and lists that are kept."""


class Vocabulary:
    """The tokens of a model as bytes, empty for tokens that are never text."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens
        self._sizes = np.array([len(token) for token in tokens], dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._data = np.frombuffer(b"".join(tokens) + b"\0", np.uint8)
        self._counts: dict[int, tuple[NDArray[np.int16], NDArray[np.bool_]]] = {}
        self._masks: dict[tuple[int, int, bool], Words] = {}
        self._tails: dict[int, tuple[Indices, Indices]] = {}
        self._lists: dict[tuple[int, int, int], Indices] = {}
        quotes = np.array([token.count(b'"') for token in tokens], dtype=np.int64)
        self._several = np.flatnonzero(quotes >= 2)
        opening = np.flatnonzero(quotes == 1).tolist()
        self._leading = _Openers([i for i in opening if tokens[i][:1] == b'"'], tokens)
        self._inner = _Openers([i for i in opening if tokens[i][:1] != b'"'], tokens)

    def narrow_inplace(self, words: Words, follower: Follower) -> None:
        """Clear the bits of tokens with which a string or a name would become too long, or a string be
        closed too short.

        words: int32 (W,), the mask of the grammar.
        """
        lex = int(follower.lex)
        if follower.mode is Mode.OUTSIDE:
            lex = Lex.CLOSED
            self._narrow_outside(words, follower)
        else:
            self._narrow_string(words, follower)
        self._follow(words, self._reopening(lex, follower.table), follower)

    def _narrow_outside(self, words: Words, follower: Follower) -> None:
        openers = self._leading.longer_than(follower.longest_next)
        if follower.table.states[follower.here].reserve and not follower.is_naming:
            self._follow(words, openers, follower)
        else:
            _clear(words, openers)
        self._follow(words, self._inner.longer_than(follower.table.least_maximum), follower)

    def _narrow_string(self, words: Words, follower: Follower) -> None:
        left, need = follower.left, follower.need
        if left < self._longest:
            words &= self._mask(follower.lex, left, is_closing=False)
        if need > 0:
            words &= self._mask(follower.lex, min(need, self._longest + 1), is_closing=True)
        spare = left - follower.reserve
        if follower.node != NONE and spare < self._longest:
            widths, _ = self._counted(follower.lex)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(widths)]
            self._follow_texts(words, np.flatnonzero(bits & (widths > spare)), follower)

    def _follow(self, words: Words, indices: Indices, follower: Follower) -> None:
        allowed = indices[(words[indices >> 5] >> (indices & 31).astype(np.int32)) & 1 != 0]
        wrong = [index for index in allowed.tolist() if not follower.fits(self.tokens[index])]
        _clear(words, np.array(wrong, dtype=np.int64))

    def _follow_texts(self, words: Words, indices: Indices, follower: Follower) -> None:
        """Clear those of the tokens behind which the text of a string could not come to an end in time.
        All at once, as there can be many."""
        table, count = follower.table, len(indices)
        sizes, starts = self._sizes[indices], self._starts[indices]
        states = np.full(count, follower.lex, dtype=np.int8)
        nodes = np.full(count, follower.node, dtype=np.int64)
        left = np.full(count, follower.left, dtype=np.int64)
        fits = np.ones(count, dtype=np.bool_)
        for position in range(int(sizes.max(initial=0))):
            live = np.flatnonzero((sizes > position) & (states != Lex.CLOSED) & fits)
            now, read = states[live], self._data[starts[live] + position]
            left[live] -= _BEGUN[now, read]
            states[live] = _NEXT[now, read]
            nodes[live], needed = table.following(nodes[live], read)
            fits[live] = (left[live] >= needed) | (states[live] == Lex.CLOSED)
        _clear(words, indices[~fits])

    def _mask(self, lex: int, count: int, *, is_closing: bool) -> Words:
        """The tokens with at most so many characters of a string; with is_closing, those that have at
        least so many or do not close it."""
        key = int(lex), count, is_closing
        found = self._masks.get(key)
        if found is None:
            widths, closes = self._counted(lex)
            found = _packed(~closes | (widths >= count) if is_closing else widths <= count)
            if len(self._masks) >= _MOST_KEPT:
                self._masks.clear()
            self._masks[key] = found
        return found

    def _reopening(self, lex: int, table: Table) -> Indices:
        """The tokens with several quotes of which the table has to be asked what they begin. lex: where
        they begin."""
        key = int(lex), table.least_maximum, table.greatest_minimum
        found = self._lists.get(key)
        if found is None:
            longest, shortest = self._tail(lex)
            is_asked = (longest > table.least_maximum) | (shortest < table.greatest_minimum)
            if len(self._lists) >= _MOST_KEPT:
                self._lists.clear()
            found = self._lists[key] = self._several[is_asked]
        return found

    def _tail(self, lex: int) -> tuple[Indices, Indices]:
        """Of the tokens with several quotes: the most characters of a string that begins in the token,
        and the least characters of one that also ends in it."""
        found = self._tails.get(int(lex))
        if found is None:
            pairs = [_strings_begun(self.tokens[index], lex) for index in self._several.tolist()]
            longest, shortest = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
            found = self._tails[int(lex)] = longest, shortest
        return found

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
        starts = self._starts[order]
        states = np.full(len(order), lex, dtype=np.int8)
        widths = np.zeros(len(order), dtype=np.int16)
        for position in range(int(sizes.max(initial=0))):
            live = int(np.searchsorted(-sizes, -position))  # the tokens with more bytes
            now, read = states[:live], self._data[starts[:live] + position]
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

    def longer_than(self, characters: int) -> Indices:
        """The tokens with more characters behind the quote."""
        return self._tokens[: int(np.searchsorted(self._behind, -characters))]


def _characters(data: bytes) -> int:
    """The characters that begin in the bytes of a string."""
    state, count = int(Lex.PLAIN), 0
    for byte in data:
        state, begun = STEPS[state][byte]
        count += begun
    return count


def _strings_begun(token: bytes, lex: int) -> tuple[int, int]:
    """The most characters of a string that begins in a token, and the least of one that also ends in it.
    lex: where the token begins; CLOSED: between strings."""
    longest, shortest, count = 0, _NEVER, None
    for byte in token:
        if lex == Lex.CLOSED:
            if byte == ord('"'):
                lex, count = Lex.PLAIN, 0
            continue
        lex, begun = STEPS[lex][byte]
        if count is None:
            continue
        count += begun
        longest = max(longest, count)
        if lex == Lex.CLOSED:
            shortest = min(shortest, count)
    return longest, shortest


def _clear(words: Words, indices: Indices) -> None:
    bits = np.left_shift(np.uint32(1), (indices & 31).astype(np.uint32))
    np.bitwise_and.at(words.view(np.uint32), indices >> 5, ~bits)


def _packed(bits: NDArray[np.bool_]) -> Words:
    """bool (V,) as int32 (W,); bits beyond V are set."""
    padded = np.ones(-(-len(bits) // 32) * 32, dtype=np.bool_)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view(np.int32)
