"""DeepStack for one engine: computes features after a vision block, and adds them to the residual
before the last norm of a decoder layer.

Two threads of TurboMind call this module. The scheduling thread prepares batches; in an
asynchronous engine, the scheduling thread is one batch ahead of the forward thread. The forward
thread runs the batches in the same order. So the plans of batches with images are queued, and each
vision forward takes the oldest plan. A request that is cancelled in between stays in its batch, so
the order of plans stays correct.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lmdeploy_ext.deepstack.binding import SEGMENT_FIELDS, Event, Kind
from lmdeploy_ext.deepstack.memory import on_stream, view
from lmdeploy_ext.deepstack.mergers import Merger
from lmdeploy_ext.deepstack.plan import Plan, plan

logger = logging.getLogger("lmdeploy_ext")

RESERVED_ROWS = 8192
"""Image tokens per forward with reserved memory; equal to LMDeploy's default prefill size. The memory
is reserved before the KV cache is allocated, and grows if a forward has more image tokens."""
_PATCHES = 4


class Features:
    """The listener of the hook library.

    Args:
        mergers: one for each entry of ``taps``, at most one for each decoder layer.
        taps: the vision blocks whose output the mergers read; feature k is added before the last
            norm of decoder layer k.
        width: hidden size of the decoder.
        dtype: dtype of the vision tower.
        dtypes: TurboMind's data type ids -> torch dtypes.
    """

    def __init__(
        self,
        mergers: Sequence[Merger],
        taps: Sequence[int],
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        dtypes: Mapping[int, torch.dtype],
    ) -> None:
        self._mergers = dict(zip(taps, mergers, strict=True))
        self._layer = {block: layer for layer, block in enumerate(taps)}
        self._width, self._device, self._dtypes = width, device, dtypes
        self._plans: deque[Plan] = deque()
        self._plan: Plan | None = None
        self._ready: set[int] = set()
        shape = (len(mergers), RESERVED_ROWS, width)
        self._features = torch.empty(shape, dtype=dtype, device=device)
        self.forwards = 0
        """Number of forwards with images so far."""

    def tell(self, event: Event) -> None:
        """Called by the hook library, on TurboMind's threads.

        An error ends the process, like a failed check of TurboMind itself: otherwise the answers in
        progress would be silently wrong.
        """
        try:
            with on_stream(event.stream, self._device):
                self._handle(event)
        except BaseException:
            logger.critical(
                "DeepStack failed within TurboMind; the process ends, since it cannot go on without "
                "giving wrong answers",
                exc_info=True,
            )
            logging.shutdown()
            os.abort()

    def _handle(self, event: Event) -> None:
        if event.kind == Kind.SEGMENTS:
            self._set_up(event)
        elif event.kind == Kind.VISION_BEGINS:
            self._begin(event)
        elif event.kind == Kind.BLOCK_ENDS:
            self._compute(event)
        else:
            self._add(event)

    def _set_up(self, event: Event) -> None:
        """Read the positions of the images in a batch. Blocks only on copies that the scheduling
        thread started."""
        table = view(event.data, (event.count, SEGMENT_FIELDS), torch.int32, self._device)
        found = plan(table.tolist())
        if found is not None:
            self._plans.append(found)

    def _begin(self, event: Event) -> None:
        if not self._plans:
            raise RuntimeError("a vision forward begins that was not set up")
        self._plan = self._plans.popleft()
        self._ready.clear()
        self.forwards += 1
        self._check_patches(event, self._plan)
        if self._plan.rows > self._features.shape[1]:
            self._grow(self._plan.rows)

    def _grow(self, rows: int) -> None:
        if self._device.type != "cpu":  # the previous forward may still read the old memory
            self._features.record_stream(torch.cuda.current_stream(self._device))
        self._features = self._features.new_empty((self._features.shape[0], rows, self._width))

    def _compute(self, event: Event) -> None:
        current = self._current()
        self._check_patches(event, current)
        layer = self._layer[event.index]
        patches = self._view(event)
        if patches.dtype != self._features.dtype:
            raise RuntimeError(f"the tower computes in {patches.dtype}, not {self._features.dtype}")
        out = self._features[layer, : current.rows]
        self._mergers[event.index](patches, current.sources, out)
        self._ready.add(layer)

    def _add(self, event: Event) -> None:
        current = self._current()
        if event.index not in self._ready:
            raise RuntimeError(f"feature {event.index} was not computed in this forward")
        if event.width != self._width or current.targets[-1][1] > event.count:
            raise RuntimeError(
                f"the residual is {(event.count, event.width)}; rows up to {current.targets[-1][1]} "
                f"of width {self._width} were expected"
            )
        residual = self._view(event)
        features = self._features[event.index, : current.rows].to(residual.dtype)
        row = 0
        for begin, end in current.targets:
            residual[begin:end] += features[row : row + end - begin]
            row += end - begin

    def _current(self) -> Plan:
        if self._plan is None:
            raise RuntimeError("no vision forward has begun")
        return self._plan

    @staticmethod
    def _check_patches(event: Event, expected: Plan) -> None:
        if event.count != _PATCHES * expected.tokens:
            raise RuntimeError(
                f"{event.count} patches are in the tower, {_PATCHES * expected.tokens} were set up"
            )

    def _view(self, event: Event) -> Tensor:
        dtype = self._dtypes.get(event.dtype)
        if dtype is None:
            raise RuntimeError(f"TurboMind's data type {event.dtype} is unknown")
        return view(event.data, (event.count, event.width), dtype, self._device)
