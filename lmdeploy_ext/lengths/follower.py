"""Follows the JSON text of an answer and counts the characters of its strings.

This is the definition; ``lengths.c`` does the same for TurboMind, and tests compare both.

The text is one that the grammar allows: strict JSON, in which declared names are written as ``json.dumps``
writes them. A character counts when its first byte is written: the first byte in UTF-8, or the backslash
of an escape. The second half of a surrogate pair does not count. So a string at its maximum can always be
closed, and so can one whose last character is not complete yet. Where a text cannot end everywhere, as an
address without its domain, the table has the characters that it still needs at each place.
"""

from __future__ import annotations

import enum

from lmdeploy_ext.lengths.table import NONE, Table


class Mode(enum.IntEnum):
    """Where the end of the text is."""

    OUTSIDE = 0
    """Between strings."""
    NAME = 1
    """In the name of a property."""
    STRING = 2
    """In a string that is a value."""


class Lex(enum.IntEnum):
    """The end of the text inside a string."""

    PLAIN = 0
    ESCAPE = 1
    """Behind a backslash."""
    CODE = 2
    r"""Behind ``\u``."""
    CODE_D = 3
    """One digit, D: perhaps of a surrogate."""
    CODE_1 = 4
    HIGH_2 = 5
    """Two digits, D8 to DB: the first half of a pair of surrogates."""
    CODE_2 = 6
    HIGH_3 = 7
    CODE_3 = 8
    PAIR = 9
    """Between the halves of a pair."""
    PAIR_ESCAPE = 10
    PAIR_CODE = 11
    PAIR_1 = 12
    PAIR_2 = 13
    PAIR_3 = 14
    CLOSED = 15
    """Behind the closing quote."""


_QUOTE, _BACKSLASH, _U = b'"\\u'
_NEXT_DIGIT = {
    Lex.CODE_1: Lex.CODE_2,
    Lex.HIGH_2: Lex.HIGH_3,
    Lex.CODE_2: Lex.CODE_3,
    Lex.HIGH_3: Lex.PAIR,
    Lex.CODE_3: Lex.PLAIN,
    Lex.PAIR_CODE: Lex.PAIR_1,
    Lex.PAIR_1: Lex.PAIR_2,
    Lex.PAIR_2: Lex.PAIR_3,
    Lex.PAIR_3: Lex.PLAIN,
}


def _step(lex: Lex, byte: int) -> tuple[int, int]:
    """The state after a byte of a string, and the characters that begin with the byte, 0 or 1."""
    if lex in _NEXT_DIGIT:
        return _NEXT_DIGIT[lex], 0
    if lex is Lex.CLOSED:
        return Lex.CLOSED, 0
    if lex is Lex.ESCAPE:
        return (Lex.CODE if byte == _U else Lex.PLAIN), 0
    if lex is Lex.CODE:
        return (Lex.CODE_D if byte in b"dD" else Lex.CODE_1), 0
    if lex is Lex.CODE_D:
        return (Lex.HIGH_2 if byte in b"89abAB" else Lex.CODE_2), 0
    if lex is Lex.PAIR_ESCAPE:
        return (Lex.PAIR_CODE if byte == _U else Lex.PLAIN), 0
    if byte == _BACKSLASH:
        return (Lex.PAIR_ESCAPE, 0) if lex is Lex.PAIR else (Lex.ESCAPE, 1)
    if byte == _QUOTE:
        return Lex.CLOSED, 0
    return Lex.PLAIN, int(byte & 0xC0 != 0x80)


STEPS: tuple[tuple[tuple[int, int], ...], ...] = tuple(
    tuple(_step(lex, byte) for byte in range(256)) for lex in Lex
)
"""By state and byte: the next state, and the characters that begin."""

Frame = tuple[bool, int, int]
"""An open object or array: whether it is an object, its state in the table, the index of the item."""
Stack = tuple[Frame, "Stack"] | None


class Follower:
    """Follows one answer.

    Attributes:
        mode, lex: where the end of the text is; lex only in STRING and NAME.
        here: in OUTSIDE, the state of the value that comes next.
        is_naming: in OUTSIDE, whether the next string is a name.
        left: in STRING and NAME, how many characters it can still have.
        need: in STRING, how many it still has to have; 0 or less: none.
        reserve: in STRING, the most characters that the text can need to come to an end.
        node: in STRING and NAME, the node of the table that has been reached, or NONE.
    """

    __slots__ = (
        "_stack", "here", "is_naming", "left", "lex", "mode", "need", "node", "reserve", "table",
    )  # fmt: skip

    def __init__(self, table: Table) -> None:
        self.table = table
        self.mode = Mode.OUTSIDE
        self.lex: int = Lex.PLAIN
        self.here = table.root
        self.left = self.need = self.reserve = 0
        self.is_naming = False
        self.node = NONE
        self._stack: Stack = None

    def fits(self, data: bytes) -> bool:
        """Whether the text can go on with these bytes. Changes nothing."""
        return self._copy().feed(data)

    @property
    def longest_next(self) -> int:
        """In OUTSIDE, how many characters a string or name can begin with, if one comes next, whatever
        they are."""
        if self.is_naming and self._stack is not None:
            number: int = self._stack[0][1]
            return self.table.states[number].name_maximum
        here = self.table.states[self.here]
        longest: int = here.maximum - here.reserve
        return longest

    def feed(self, data: bytes) -> bool:
        """Go on with these bytes; stops and returns False where a string is too long or too short."""
        return all(self._byte(byte) for byte in data)

    def _copy(self) -> Follower:
        other = Follower.__new__(Follower)
        for name in Follower.__slots__:
            setattr(other, name, getattr(self, name))
        return other

    def _byte(self, byte: int) -> bool:
        if self.mode is Mode.STRING:
            return self._in_string(byte)
        if self.mode is Mode.NAME:
            return self._in_name(byte)
        self._outside(byte)
        return True

    def _in_string(self, byte: int) -> bool:
        self.lex, begun = STEPS[self.lex][byte]
        self.left -= begun
        self.need -= begun
        if self.lex == Lex.CLOSED:
            self.mode = Mode.OUTSIDE
            return self.need <= 0
        self._go_on(byte)
        needed = 0 if self.node == NONE else self.table.distances[self.node]
        return self.left >= needed

    def _in_name(self, byte: int) -> bool:
        self.lex, begun = STEPS[self.lex][byte]
        self.left -= begun
        if self.lex == Lex.CLOSED:
            assert self._stack is not None
            state = self.table.states[self._stack[0][1]]
            end = NONE if self.node == NONE else self.table.ends[self.node]
            self.here = state.other if end == NONE else end
            self.mode, self.is_naming = Mode.OUTSIDE, False
            return True
        self._go_on(byte)
        return self.left >= 0

    def _go_on(self, byte: int) -> None:
        if self.node != NONE:
            self.node = self.table.next_node(self.node, byte)

    def _outside(self, byte: int) -> None:
        if byte == _QUOTE:
            self._open_string()
        elif byte in b"{[":
            self._open(is_object=byte == ord("{"))
        elif byte in b"}]":
            self._stack = self._stack and self._stack[1]
            self.is_naming = False
        elif byte == ord(",") and self._stack is not None:
            (is_object, number, index), below = self._stack
            self.is_naming = is_object
            if not is_object:
                self._stack = (False, number, index + 1), below
                self.here = self._item(number, index + 1)

    def _open_string(self) -> None:
        self.lex = Lex.PLAIN
        if self.is_naming and self._stack is not None:
            state = self.table.states[self._stack[0][1]]
            self.mode, self.node = Mode.NAME, state.names
            self.left, self.need, self.reserve = state.name_maximum, 0, 0
            return
        state = self.table.states[self.here]
        self.mode, self.node = Mode.STRING, state.text
        self.left, self.need, self.reserve = state.maximum, state.minimum, state.reserve

    def _open(self, *, is_object: bool) -> None:
        number = self.here
        self._stack = (is_object, number, 0), self._stack
        self.is_naming = is_object
        if not is_object:
            self.here = self._item(number, 0)

    def _item(self, number: int, index: int) -> int:
        state = self.table.states[number]
        return state.items[index] if index < len(state.items) else state.rest
