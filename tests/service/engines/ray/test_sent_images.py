"""Images on their way to a replica: as their files, decoded there as they would be here."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lmdeploy_ext.images.files import ImageLimits
from service.errors import ImageError
from service.inference.decoding import ImageDecoder, RequestImage
from service.types import EncodedImage

LIMITS = ImageLimits(background=(10, 200, 30), jpeg_scaled_pixels=1_000_000)


def file(name: str) -> bytes:
    rng = np.random.default_rng(1)
    buffer = io.BytesIO()
    if name == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(
            buffer, "JPEG", exif=exif
        )
    elif name == "transparent":
        Image.fromarray(rng.integers(0, 256, (40, 60, 4), dtype=np.uint8)).save(buffer, "PNG")
    else:
        Image.linear_gradient("L").resize((1600, 1200)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


async def opened(data: bytes) -> RequestImage:
    encoded = EncodedImage("images[3].data", data, min_pixels=7, max_pixels=9)
    (image,) = await ImageDecoder(LIMITS, 256 * 2**20).open([encoded], "caller")
    return image


def pixels(rows: Any) -> Any:
    return np.array(rows)


@pytest.mark.parametrize("name", ["turned", "transparent", "scaled"])
async def test_pixels_are_the_same_on_the_other_side(name: str) -> None:
    here = await opened(file(name))
    there = pickle.loads(pickle.dumps(here))
    expected = await here.reduced(pixels)
    assert np.array_equal(await there.reduced(pixels), expected)
    assert (there.width, there.height) == expected.shape[1::-1]
    assert (there.min_pixels, there.max_pixels) == (7, 9)
    assert (await there.file()) == (await here.file())


async def test_a_damaged_file_is_reported_on_its_field() -> None:
    data = file("transparent")
    here = await opened(data[:-40] + bytes(28) + data[-12:])
    there = pickle.loads(pickle.dumps(here))
    found = []
    for image in (here, there):
        with pytest.raises(ImageError) as raised:
            await image.reduced(pixels)
        found.append(vars(raised.value))
    assert found[0] == found[1]
    assert found[0]["violations"][0].field == "images[3].data"


async def test_limits_of_memory_cross_too() -> None:
    encoded = EncodedImage("images[0].data", file("scaled"))
    (here,) = await ImageDecoder(LIMITS, 64 * 2**20).open([encoded], "caller")
    there = pickle.loads(pickle.dumps(here))
    with pytest.raises(ImageError) as raised:
        await there.reduced(pixels, needs_bytes=64 * 2**20)
    assert raised.value.reason == "IMAGE_NEEDS_TOO_MUCH_MEMORY"
