"""The limits of one schema: which lengths strings can have at which position of the answer.

The format is described in ``service/schema_compiler/emit/length_plan.py``, which writes it. A table may
come from a process that read a hostile schema, so all numbers are checked before they are used.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

FORMAT = 2
NONE = -1
UNLIMITED = 2**31 - 1
_HEADER, _STATE, _NODE, _EDGE = 7, 10, 4, 2


class TableError(ValueError):
    """The bytes are not a table of lengths."""


@dataclass(frozen=True, slots=True)
class State:
    """What is known at one position of an answer.

    minimum, maximum: characters of a string here. text: node at which the text of a string here begins,
    or NONE. reserve: the most characters that such a text needs to come to an end. name_maximum:
    characters of a name in an object here. names: node at which those names begin, or NONE. other: state
    of the values of other names. items: states of the first items of an array here. rest: state of
    further items.
    """

    minimum: int
    maximum: int
    text: int
    reserve: int
    name_maximum: int
    names: int
    other: int
    items: tuple[int, ...]
    rest: int


class Table:
    """A table of lengths.

    Attributes:
        numbers: the table as int32, for the library.
        states, root: the states, and the number of the one of the whole answer.
        ends: by node, the state of the value of the name that ends there, or NONE.
        distances: by node, the characters that a text needs at least to come to an end.
        least_maximum: so many characters fit at the beginning of each string and name.
        greatest_minimum: the greatest minimum of all states.
    """

    def __init__(self, data: bytes) -> None:
        """Raises TableError."""
        if len(data) % 4 or len(data) < 4 * _HEADER:
            raise TableError("it is not a sequence of integers")
        self.numbers: NDArray[np.int32] = np.frombuffer(data, "<i4").astype(np.int32)
        form, *sizes, self.root, self.least_maximum = self.numbers[:_HEADER].tolist()
        states, nodes, edges, items = sizes
        ends = np.cumsum([_HEADER, states * _STATE, nodes * _NODE, edges * _EDGE, items])
        if form != FORMAT or min(sizes) < 0 or states < 1 or ends[-1] != len(self.numbers):
            raise TableError("its sizes do not fit")
        parts = np.split(self.numbers, ends)[1:5]
        rows, node_rows, edge_rows = (
            part.reshape(-1, width)
            for part, width in zip(parts, (_STATE, _NODE, _EDGE), strict=False)
        )
        self._check(rows, node_rows, edge_rows, parts[3])
        self.states = [
            State(
                *(low, high, text, reserve, longest, names, other),
                tuple(parts[3][first : first + count].tolist()),
                rest,
            )
            for low, high, text, reserve, longest, names, other, first, count, rest in rows.tolist()
        ]
        self.greatest_minimum = int(rows[:, 0].max())
        self._bytes: list[int] = edge_rows[:, 0].tolist()
        self._targets: list[int] = edge_rows[:, 1].tolist()
        self._fans: list[list[int]] = node_rows[:, :2].tolist()
        self.ends: list[int] = node_rows[:, 2].tolist()
        self.distances: list[int] = node_rows[:, 3].tolist()

    def following(
        self, nodes: NDArray[np.int64], data: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The nodes behind a byte each, NONE where there is none, and the characters that a text needs
        there at least."""
        keys, targets = self._edge_arrays
        at = np.searchsorted(keys, nodes * 256 + data, side="right") - 1
        found = np.where((nodes != NONE) & (keys[at] >> 8 == nodes), targets[at], NONE)
        return found, np.where(found == NONE, 0, self._distance_array[found])

    def next_node(self, node: int, byte: int) -> int:
        """The node behind a byte of a name or a text, or NONE."""
        first, count = self._fans[node]
        at = bisect_right(self._bytes, byte, first, first + count) - 1
        return self._targets[at] if at >= first else NONE

    @cached_property
    def _distance_array(self) -> NDArray[np.int64]:
        return np.array(self.distances, dtype=np.int64)

    @cached_property
    def _edge_arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """By rising number of the node and byte: 256 * node + byte, and the next node. Before them a pair
        that no node has, so that one is found for each node."""
        pairs = sorted(
            (256 * node + self._bytes[at], self._targets[at])
            for node, (first, count) in enumerate(self._fans)
            for at in range(first, first + count)
        )
        pairs.insert(0, (-256, NONE))
        keys, targets = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return keys, targets

    @property
    def size_bytes(self) -> int:
        """Approximate memory, with the lists of Python."""
        return 16 * self.numbers.nbytes

    def _check(
        self,
        rows: NDArray[np.int32],
        nodes: NDArray[np.int32],
        edges: NDArray[np.int32],
        items: NDArray[np.int32],
    ) -> None:
        def within(values: NDArray[np.int32], low: int, high: int) -> bool:
            return bool(((values >= low) & (values < high)).all())

        lists = rows[:, 7].astype(np.int64), rows[:, 8].astype(np.int64)
        fans = nodes[:, 0].astype(np.int64), nodes[:, 1].astype(np.int64)
        fits = (
            0 <= self.root < len(rows)
            and within(rows[:, [0, 1, 3, 4]], 0, 2**31)
            and self.least_maximum <= int((rows[:, 1].astype(np.int64) - rows[:, 3]).min())
            and self.least_maximum <= int(rows[:, 4].min())
            and within(rows[:, [2, 5]], NONE, len(nodes))
            and within(rows[:, [6, 9]], 0, len(rows))
            and within(items, 0, len(rows))
            and within(nodes[:, 2], NONE, len(rows))
            and within(nodes[:, 3], 0, 2**31)
            and within(edges[:, 0], 0, 256)
            and within(edges[:, 1], NONE, len(nodes))
            and all(
                bool(((first >= 0) & (count >= 0) & (first + count <= total)).all())
                and int(count.sum()) <= total  # lists that overlap could be more than memory holds
                for (first, count), total in ((lists, len(items)), (fans, len(edges)))
            )
            and _rises(edges[:, 0], *fans)
        )
        if not fits:
            raise TableError("its numbers do not fit")


def _rises(values: NDArray[np.int32], first: NDArray[np.int64], count: NDArray[np.int64]) -> bool:
    """Whether the values of each list are in rising order."""
    falls = np.cumsum(np.diff(values, prepend=-1) <= 0)
    some = count > 0
    return bool((falls[first[some] + count[some] - 1] == falls[first[some]]).all())
