"""The limits of one schema: which lengths strings can have at which position of the answer.

The format is described in ``service/schema_compiler/emit/length_plan.py``, which writes it. A table may
come from a process that read a hostile schema, so all numbers are checked before they are used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
NONE = -1
UNLIMITED = 2**31 - 1
_HEADER, _STATE, _NODE, _EDGE = 7, 7, 3, 2


class TableError(ValueError):
    """The bytes are not a table of lengths."""


@dataclass(frozen=True, slots=True)
class State:
    """What is known at one position of an answer.

    minimum, maximum: characters of a string here. names: node at which names of an object here begin,
    or NONE. other: state of the values of other names. items: states of the first items of an array
    here. rest: state of further items.
    """

    minimum: int
    maximum: int
    names: int
    other: int
    items: tuple[int, ...]
    rest: int


class Table:
    """A table of lengths.

    Attributes:
        numbers: the table as int32, for the library.
        states, root: the states, and the number of the one of the whole answer.
        edges: by node, the next node for each byte of a name.
        ends: by node, the state of the value of the name that ends there, or NONE.
        least_maximum: the least maximum of all states.
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
            State(low, high, names, other, tuple(parts[3][first : first + count].tolist()), rest)
            for low, high, names, other, first, count, rest in rows.tolist()
        ]
        pairs = [(byte, node) for byte, node in edge_rows.tolist()]
        self.edges: list[dict[int, int]] = [
            dict(pairs[first : first + count]) for first, count, _ in node_rows.tolist()
        ]
        self.ends: list[int] = node_rows[:, 2].tolist()

    @property
    def size_bytes(self) -> int:
        """Approximate memory; the dictionary of a node takes about 240 bytes."""
        return 4 * self.numbers.nbytes + 240 * len(self.edges)

    def _check(
        self,
        rows: NDArray[np.int32],
        nodes: NDArray[np.int32],
        edges: NDArray[np.int32],
        items: NDArray[np.int32],
    ) -> None:
        def within(values: NDArray[np.int32], low: int, high: int) -> bool:
            return bool(((values >= low) & (values < high)).all())

        lists = rows[:, 4].astype(np.int64), rows[:, 5].astype(np.int64)
        fans = nodes[:, 0].astype(np.int64), nodes[:, 1].astype(np.int64)
        fits = (
            0 <= self.root < len(rows)
            and within(rows[:, :2], 0, 2**31)
            and self.least_maximum <= int(rows[:, 1].min())
            and within(rows[:, 2], NONE, len(nodes))
            and within(rows[:, [3, 6]], 0, len(rows))
            and within(items, 0, len(rows))
            and within(nodes[:, 2], NONE, len(rows))
            and within(edges[:, 0], 0, 256)
            and within(edges[:, 1], 0, len(nodes))
            and all(
                bool(((first >= 0) & (count >= 0) & (first + count <= total)).all())
                for (first, count), total in ((lists, len(items)), (fans, len(edges)))
            )
        )
        if not fits:
            raise TableError("its numbers do not fit")
