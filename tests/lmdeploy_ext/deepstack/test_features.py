"""Features without TurboMind: memory of this process plays the device, an event at a time."""

from __future__ import annotations

import pytest
import torch

from lmdeploy_ext.deepstack import features as module
from lmdeploy_ext.deepstack.binding import Event, Kind
from lmdeploy_ext.deepstack.features import Features
from lmdeploy_ext.deepstack.mergers import Merger

HIDDEN, OUT, DTYPE = 8, 12, 7


@pytest.fixture
def merger() -> Merger:
    torch.manual_seed(0)
    wide = 4 * HIDDEN
    shapes = iter([(wide,), (wide,), (wide, wide), (wide,), (OUT, wide), (OUT,)])
    return Merger(lambda name: torch.randn(next(shapes)), wide, OUT)


@pytest.fixture
def features(merger: Merger, monkeypatch: pytest.MonkeyPatch) -> Features:
    monkeypatch.setattr(module, "RESERVED_ROWS", 4)  # less than a forward needs
    kinds = {DTYPE: torch.float32}
    return Features([merger], [2], OUT, torch.float32, torch.device("cpu"), kinds)


def event(kind: Kind, tensor: torch.Tensor, index: int = 0, dtype: int = DTYPE) -> Event:
    return Event(kind, index, tensor.data_ptr(), *tensor.shape, dtype, 0)


def segments(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def test_plans_are_used_in_the_order_of_their_batches(features: Features, merger: Merger) -> None:
    """Two batches are set up before the first of them runs; a batch of text has no turn."""
    tables = [
        segments((0, 2, 0, 0, 0, 0), (2, 9, 2, 3, 3, 0)),
        segments((0, 4, 0, 0, 0, 0)),
        segments((1, 2, 0, 2, 2, 2)),
    ]
    for table in tables:
        features._handle(event(Kind.SEGMENTS, table))
    for tokens, rows, source in ((9, range(2, 11), slice(0, 9)), (4, range(1, 3), slice(2, 4))):
        patches, residual = torch.randn(4 * tokens, HIDDEN), torch.randn(15, OUT)
        wanted, out = residual.clone(), torch.empty(tokens, OUT)
        merger(patches, [(0, tokens)], out)
        wanted[list(rows)] += out[source]
        features._handle(event(Kind.VISION_BEGINS, patches))
        features._handle(event(Kind.BLOCK_ENDS, patches, 2))
        features._handle(event(Kind.LAYER_ENDS, residual))
        assert torch.allclose(residual, wanted, atol=1e-5)
    assert features.forwards == 2


def test_unexpected_events_are_errors(features: Features) -> None:
    patches, residual = torch.randn(36, HIDDEN), torch.randn(15, OUT)
    with pytest.raises(RuntimeError, match="was not set up"):
        features._handle(event(Kind.VISION_BEGINS, patches))
    tables = [segments((2, 9, 2, 3, 3, 0)), segments((8, 9, 2, 3, 3, 0))]  # an event has no copy
    for table in tables:
        features._handle(event(Kind.SEGMENTS, table))
    features._handle(event(Kind.VISION_BEGINS, patches))
    with pytest.raises(RuntimeError, match="feature 0 was not computed"):
        features._handle(event(Kind.LAYER_ENDS, residual))
    with pytest.raises(RuntimeError, match="32 patches are in the tower, 36 were set up"):
        features._handle(event(Kind.BLOCK_ENDS, patches[:32], 2))
    with pytest.raises(RuntimeError, match="data type 99 is unknown"):
        features._handle(event(Kind.BLOCK_ENDS, patches, 2, dtype=99))
    features._handle(event(Kind.VISION_BEGINS, patches))
    features._handle(event(Kind.BLOCK_ENDS, patches, 2))
    with pytest.raises(RuntimeError, match="rows up to 17 of width 12 were expected"):
        features._handle(event(Kind.LAYER_ENDS, residual))
