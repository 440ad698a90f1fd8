"""What goes out: images as files that every decoder reads the same, and schemas in the form that is taken."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from dataclasses import dataclass, field

import jsonschema
import numpy as np
import pytest
from PIL import Image

from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig, preprocess
from service.engines.remote.chat import dumps
from service.engines.remote.images import Outgoing, Sizing, files
from service.engines.remote.schemas import forms, simplified
from service.engines.remote.servers import SERVERS
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.types import Grammar, GrammarKind, ImageFile
from service.types import Image as DecodedImage
from tests.service.engines.remote.scripted import Asked, completion, saying
from tests.service.engines.remote.serving import GOOD, OBJECT, pair, question
from tests.service.harness import failure

pytestmark = pytest.mark.slow

PIXELS = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encoded(format: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, format, **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


@pytest.mark.parametrize(
    "data", [encoded("JPEG"), encoded("PNG"), encoded("JPEG", progressive=True)]
)
async def test_a_plain_file_goes_out_as_it_came(data: bytes) -> None:
    async with pair(saying(GOOD)) as (front, back):
        await front.stub.RunTask(question(images=[pb.Image(data=data)]), timeout=60)
    image, text = back.asked[0].json["messages"][0]["content"]
    assert text == {"type": "text", "text": "How many?"}
    head, _, body = image["image_url"]["url"].partition(",")
    assert head in ("data:image/jpeg;base64", "data:image/png;base64")
    assert base64.b64decode(body) == data


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (pb.Image(data=turned()), (40, 60)),
        (pb.Image(data=encoded("JPEG", "CMYK")), (60, 40)),
        (pb.Image(data=encoded("JPEG", "L")), (60, 40)),
        (pb.Image(data=encoded("PNG", "RGBA")), (60, 40)),
        (pb.Image(data=encoded("PNG", "P")), (60, 40)),
        (pb.Image(data=encoded("WEBP")), (60, 40)),
        (pb.Image(data=encoded("JPEG"), max_pixels=600), (30, 20)),
    ],
)
async def test_other_files_go_out_as_upright_png(image: pb.Image, size: tuple[int, int]) -> None:
    async with pair(saying(GOOD)) as (front, back):
        await front.stub.RunTask(question(images=[image]), timeout=60)
    url = back.asked[0].json["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert (sent.mode, sent.size) == ("RGB", size)


def resized_file(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).resize((width, height)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("image", "options", "size"),
    [
        (pb.Image(data=encoded("JPEG")), {}, (320, 224)),
        (pb.Image(data=encoded("WEBP")), {}, (320, 224)),
        (pb.Image(data=turned()), {}, (224, 320)),
        (pb.Image(data=encoded("PNG")), {"remote_min_pixels": 4096}, (96, 64)),
        (pb.Image(data=encoded("PNG"), min_pixels=16384), {}, (160, 128)),
        (pb.Image(data=encoded("PNG"), max_pixels=4096), {}, (96, 64)),
        (
            pb.Image(data=resized_file(640, 480)),
            {"remote_min_pixels": 1024, "remote_max_pixels": 20_000},
            (160, 96),
        ),
    ],
)
async def test_images_go_out_in_the_size_of_the_models_own_processing(
    image: pb.Image, options: dict[str, int], size: tuple[int, int]
) -> None:
    """The sizes are those of transformers' ``smart_resize`` with patches of 16 pixels, two by two."""
    async with pair(saying(GOOD), remote_resize=True, **options) as (front, back):
        await front.stub.RunTask(question(images=[image]), timeout=60)
    url = back.asked[0].json["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert (sent.mode, sent.size) == ("RGB", size)


async def test_an_image_in_the_right_size_goes_out_as_it_came() -> None:
    data = resized_file(320, 224)
    async with pair(saying(GOOD), remote_resize=True) as (front, back):
        await front.stub.RunTask(question(images=[pb.Image(data=data)]), timeout=60)
    url = back.asked[0].json["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == data


async def test_the_resized_image_is_the_one_of_the_reference_engine() -> None:
    """Pixel by pixel, but for the rounding of two libraries."""
    pixels = np.random.default_rng(2).integers(0, 256, (150, 210, 3), dtype=np.uint8)
    config = ImageProcessorConfig(min_pixels=65_536)
    packed = preprocess(pixels, config)
    ((media_type, data),) = await files([DecodedImage(pixels)], Sizing(resize=True))
    sent = np.asarray(Image.open(io.BytesIO(data)))
    again = preprocess(sent, config)
    assert media_type == "image/png"
    assert again.grid == packed.grid
    apart = np.abs(again.patches.astype(int) - packed.patches.astype(int))
    assert apart.max() <= 1


async def test_sides_too_far_apart_are_refused_before_anything_is_sent() -> None:
    narrow = io.BytesIO()
    Image.new("RGB", (2, 500)).save(narrow, "PNG")
    async with pair(saying(GOOD), remote_resize=True) as (front, back):
        image = pb.Image(data=narrow.getvalue())
        error = await failure(front.stub.RunTask(question(images=[image]), timeout=60))
        assert dict(error.field_violations).keys() == {"images[0].data"}
        assert not back.asked


@dataclass(frozen=True, eq=False)
class Counting(DecodedImage):
    """A file that is read at once, and notes how often the event loop had turned before."""

    turns: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)

    async def file(self) -> ImageFile:
        self.seen.append(len(self.turns))
        return ImageFile(b"file", "PNG", True)


async def test_other_calls_have_their_turn_between_the_files_of_one() -> None:
    turns: list[int] = []
    seen: list[int] = []

    def turn() -> None:
        turns.append(1)
        asyncio.get_running_loop().call_soon(turn)

    images = [Counting(PIXELS, turns=turns, seen=seen) for _ in range(16)]
    asyncio.get_running_loop().call_soon(turn)
    assert len(await files(images)) == 16
    assert len(set(seen)) == 16
    seen.clear()
    assert len(await Outgoing(images).files()) == 16
    assert len(set(seen)) == 16


async def test_a_truncated_file_is_refused_here() -> None:
    async with pair(saying(GOOD)) as (front, back):
        cut = pb.Image(data=encoded("JPEG")[:-40])
        error = await failure(front.stub.RunTask(question(images=[cut]), timeout=60))
        assert error.reason == "IMAGE_TRUNCATED"
        assert not back.asked


async def test_a_refused_schema_is_sent_in_a_simpler_form_and_checked_as_it_was() -> None:
    schema = json.loads(OBJECT)
    schema["properties"]["count"]["multipleOf"] = 3

    async def picky(asked: Asked) -> None:
        if b"multipleOf" in asked.body:
            await asked.answer({"error": "unsupported keyword"}, 400)
        else:
            await asked.answer(completion(back.text))  # type: ignore[attr-defined]

    async with pair(picky) as (front, back):
        back.text = GOOD  # type: ignore[attr-defined]
        request = question(schema=json.dumps(schema))
        assert (await front.stub.RunTask(request, timeout=60)).result.json == GOOD
        assert (await front.stub.RunTask(request, timeout=60)).result.json == GOOD
        assert len(back.asked) == 3, "the form that was taken is remembered"
        back.text = '{"count": 4}'  # type: ignore[attr-defined]
        error = await failure(front.stub.RunTask(request, timeout=60))
    assert error.reason == "OUTPUT_INVALID"


def test_forms_allow_whatever_the_schema_allows() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"oneOf": [{"type": "integer", "minimum": 3}, {"const": "x"}]}},
        "patternProperties": {"^p": {"type": "string"}},
        "additionalProperties": False,
        "required": ["a", "p1"],
        "not": {"required": ["q"]},
    }
    for form in forms(json.dumps(schema)):
        for value in ({"a": 3, "p1": "y"}, {"a": "x", "p1": ""}):
            jsonschema.validate(value, json.loads(form))
    assert "not" not in simplified(schema)


@pytest.mark.parametrize("schema", [OBJECT, "{}", ' {"enum": ["a", {"b": 1.0}]}\n', "true"])
def test_mistral_rs_gets_one_layout_of_json(schema: str) -> None:
    form = SERVERS["mistral.rs"].grammars[GrammarKind.JSON_SCHEMA]
    sent = json.loads(dumps(form(Grammar(GrammarKind.JSON_SCHEMA, schema))))
    found = sent["response_format"]["json_schema"]["schema"]
    if schema != "true":
        layout = found.pop("x-guidance")
        assert layout["whitespace_flexible"] is False
    assert found == json.loads(schema)
