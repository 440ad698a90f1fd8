"""Photographs, charts and documents through AnalyzeImage: the answer is complete and typed, or none is given.

The bundled model knows only drawings, so what it says of them means nothing; its form is what counts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from examples.drawings.evaluate import serving
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.tasks.image_analysis import FIELDS, IMAGE_ANALYSIS, STRING_FIELDS, schema
from service.wiring import BUNDLED_MODEL

IMAGES = Path(__file__).parents[3] / "shared" / "images"
FILES = sorted(IMAGES.glob("*.*"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILES, reason="the folder of real images is not there"),
]


def check(analysis: pb.ImageAnalysis) -> None:
    """The rules of the task, read off the typed message."""
    value = {
        name: getattr(analysis, name) if name in STRING_FIELDS else list(getattr(analysis, name))
        for name in FIELDS
    }
    Draft202012Validator(schema()).validate(value)
    for name in FIELDS:
        items = [value[name]] if name in STRING_FIELDS else value[name]
        assert all(item == item.strip() for item in items), name
        if name not in STRING_FIELDS:
            assert all(items), name
            assert len(set(items)) == len(items), name
    described = analysis.description and analysis.tags
    assert described or analysis.subjects or analysis.objects or analysis.actions


async def test_every_image_gets_a_valid_analysis() -> None:
    assert len(FILES) == 8
    async with serving(BUNDLED_MODEL) as stub:
        for path in FILES:
            image = pb.Image(data=path.read_bytes())
            answer = await stub.AnalyzeImage(pb.AnalyzeImageRequest(images=[image]))
            check(answer.analysis)
            assert answer.usage.image_tokens > 0, path.name
            assert answer.usage.output_tokens > 0, path.name
            assert answer.finish_reason == pb.FINISH_REASON_STOP, path.name


async def test_the_same_images_as_a_task_and_as_keyframes() -> None:
    images = [pb.Image(data=path.read_bytes()) for path in FILES]
    task = pb.Task(name=IMAGE_ANALYSIS.name)
    async with serving(BUNDLED_MODEL) as stub:
        for image in images:
            single = await stub.RunTask(pb.RunTaskRequest(task=task, images=[image]))
            Draft202012Validator(schema()).validate(json.loads(single.result.json))
        # Not any two: of most pairs of photographs the model repeats itself beyond the limit.
        pair = await stub.AnalyzeImage(pb.AnalyzeImageRequest(images=[images[0], images[2]]))
        check(pair.analysis)
