"""The key-value cache: a fixed pool of token rows, in which every request reserves one contiguous
run.

Because runs are contiguous, attention reads plain views and gathers no pages. A run covers prompt
and answer and is reserved at admission, so a running request never runs out of memory.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """Rows ``[begin, end)`` of the pool."""

    begin: int
    end: int


class RunAllocator:
    """A first-fit allocator over ``size`` rows."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._runs: list[Run] = []

    @property
    def used(self) -> int:
        """Reserved rows."""
        return sum(run.end - run.begin for run in self._runs)

    def reserve(self, length: int) -> Run | None:
        """Reserve the lowest free run of ``length`` rows; None if there is none."""
        begin = 0
        for run in self._runs:
            if run.begin - begin >= length:
                break
            begin = run.end
        if begin + length > self.size:
            return None
        reserved = Run(begin, begin + length)
        insort(self._runs, reserved)
        return reserved

    def release(self, run: Run) -> None:
        """Free a run. Raises ValueError if it is not reserved."""
        self._runs.remove(run)


class LayerMemory:
    """Keys and values of one layer.

    both: (2K, rows, d), the K key heads and then the K value heads.
    keys, values: views (1, K, rows, d) of it.
    """

    __slots__ = ("both", "keys", "values")

    def __init__(self, both: Tensor) -> None:
        self.both = both
        keys, values = both.chunk(2)
        self.keys, self.values = keys.unsqueeze(0), values.unsqueeze(0)


class KeyValueCache:
    """The pool's tensors, one per layer.

    On a CPU, rows that were never written take no physical memory. One extra row, `spare`, after
    the pool receives the padding rows of a forward pass.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = [
            LayerMemory(
                torch.empty(2 * num_kv_heads, rows + 1, head_dim, dtype=dtype, device=device)
            )
            for _ in range(num_layers)
        ]
        self.runs = RunAllocator(rows)
        self.spare = rows
