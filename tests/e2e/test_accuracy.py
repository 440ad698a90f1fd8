"""The bundled model on drawings that it has never seen, through the real server: right answers.

The numbers are those of the model card; `python -m examples.drawings.evaluate` prints all of them.
"""

from __future__ import annotations

import json

import pytest

from examples.drawings.evaluate import plain, score_analyses, score_questions, serving
from examples.drawings.faults import FAULTS
from examples.drawings.samples import FOLDER
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.wiring import BUNDLED_MODEL

pytestmark = pytest.mark.slow

WEAK = {"count_color": 0.75, "position": 0.75, "count_shape": 0.7, "present": 0.45, "moved": 0.45}
"""Kinds of questions that the model often gets wrong, as its card says: right at least so often."""

BROKEN = {
    "deepstack-dropped": 0.10,
    "features-reversed": 0.50,
    "features-late": 0.50,
    "feature-0-dropped": 0.20,
    "feature-1-dropped": 0.75,
    "feature-2-dropped": 0.50,
    "tokens-shifted": 0.10,
    "positions-swapped": 0.30,
    "positions-flat": 0.10,
}
"""Fault -> share of whole object lists that may still be right."""


async def test_analyze_image() -> None:
    async with serving(BUNDLED_MODEL) as stub:
        score = await score_analyses(stub, 256)
    assert score.share("whole object list") >= 0.95, score.table()
    assert score.share("scene") >= 0.995, score.table()
    assert score.share("lighting") >= 0.995, score.table()


async def test_two_keyframes() -> None:
    async with serving(BUNDLED_MODEL) as stub:
        score = await score_analyses(stub, 64, pairs=True)
    assert score.share("whole object list") >= 0.95, score.table()
    assert score.share("what moved") >= 0.5, score.table()


async def test_inline_tasks() -> None:
    async with serving(BUNDLED_MODEL) as stub:
        score = await score_questions(stub, 32)
    for name in score.asked:
        assert score.share(name) >= WEAK.get(name, 0.9), score.table()


def test_every_fault_has_an_accuracy_limit() -> None:
    assert set(BROKEN) == set(FAULTS)


@pytest.mark.parametrize(("fault", "most"), BROKEN.items(), ids=BROKEN)
async def test_a_fault_in_the_engine_lowers_the_accuracy(fault: str, most: float) -> None:
    async with serving(BUNDLED_MODEL, fault) as stub:
        score = await score_analyses(stub, 96)
    assert score.share("whole object list") <= most, score.table()


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.json")))
async def test_sample_drawings_are_described_correctly(name: str) -> None:
    expected = json.loads((FOLDER / f"{name}.json").read_text())
    files = sorted([*FOLDER.glob(f"{name}.png"), *FOLDER.glob(f"{name}-[0-9].png")])
    images = [pb.Image(data=file.read_bytes()) for file in files]
    async with serving(BUNDLED_MODEL) as stub:
        seen = (await stub.AnalyzeImage(pb.AnalyzeImageRequest(images=images))).analysis
    assert {field: plain(getattr(seen, field)) for field in expected} == expected
