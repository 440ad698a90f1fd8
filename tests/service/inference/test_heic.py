"""HEIC files: turned once, bounded by their headers, refused where the server does not accept them."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.heic_files import PLAIN, box, cropped, full, heic, mirrored, turned
from lmdeploy_ext.images import files
from lmdeploy_ext.images.files import ImageLimits
from lmdeploy_ext.images.formats import FORMATS
from lmdeploy_ext.images.heif_headers import MAX_PARTS
from service.engines.fake import FakeEngine
from service.errors import ImageError
from service.inference.images import decode_image
from tests.service.harness import failure, image_bytes, run_request, running
from tests.service.inference.test_image_files import swapped_profile, tiff

pytest.importorskip("pi_heif", reason="needs the extra heif")

CASES = Path(__file__).parents[4] / "shared" / "cases" / "images"
LIMITS = ImageLimits(formats=FORMATS)
RED, GREEN, BLUE, GREY = (200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 220)


def corners(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """The colours in the four corners, row by row, rounded to those of the tile."""
    height, width, _ = pixels.shape
    found = []
    for y, x in ((4, 4), (4, width - 5), (height - 5, 4), (height - 5, width - 5)):
        apart = [np.abs(pixels[y, x].astype(int) - one).max() for one in (RED, GREEN, BLUE, GREY)]
        assert min(apart) <= 3, pixels[y, x]
        found.append((RED, GREEN, BLUE, GREY)[int(np.argmin(apart))])
    return found


def refused(data: bytes, limits: ImageLimits = LIMITS) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, "images[0].data", limits)
    return caught.value


@pytest.mark.parametrize(
    ("options", "shape", "expected"),
    [
        ({}, (64, 64), [RED, GREEN, BLUE, GREY]),
        ({"properties": [turned(1)]}, (64, 64), [GREEN, GREY, RED, BLUE]),
        ({"properties": [turned(2)]}, (64, 64), [GREY, BLUE, GREEN, RED]),
        ({"properties": [turned(3)]}, (64, 64), [BLUE, RED, GREY, GREEN]),
        ({"properties": [mirrored(0)]}, (64, 64), [BLUE, GREY, RED, GREEN]),
        ({"properties": [mirrored(1)]}, (64, 64), [GREEN, RED, GREY, BLUE]),
        ({"properties": [cropped(64, 32, 64, 64)]}, (32, 64), [RED, GREEN, RED, GREEN]),
        ({"columns": 3, "rows": 2}, (128, 192), [RED, GREEN, BLUE, GREY]),
        ({"columns": 3, "rows": 2, "size": (160, 128)}, (128, 160), [RED, RED, BLUE, BLUE]),
        ({"columns": 3, "rows": 2, "properties": [turned(3)]}, (192, 128), [BLUE, RED, GREY, GREEN]),
        # Phones write the orientation twice. That in EXIF does not count.
        ({"columns": 3, "rows": 2, "properties": [turned(3)], "exif": tiff(6)}, (192, 128),
         [BLUE, RED, GREY, GREEN]),
        ({"exif": tiff(6)}, (64, 64), [RED, GREEN, BLUE, GREY]),
    ],
)  # fmt: skip
def test_an_image_is_turned_once(
    options: dict[str, Any], shape: tuple[int, int], expected: list[tuple[int, int, int]]
) -> None:
    data = heic(**options)
    header = files.check_header(data, "f", LIMITS)
    assert header.upright == shape[::-1]
    pixels = decode_image(data, "f", LIMITS)
    assert pixels.shape == (*shape, 3)
    assert corners(pixels) == expected


def test_colours_of_a_profile_become_srgb() -> None:
    pixels = decode_image(heic(profile=swapped_profile()), "f", LIMITS).astype(int)
    assert np.abs(pixels[4, 4] - (30, 30, 200)).max() <= 6
    assert np.abs(pixels[60, 4] - (200, 30, 30)).max() <= 6


def test_the_limits_hold_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        pytest.fail("a decoder has seen the file")

    monkeypatch.setattr(files, "_FRAMES", dict.fromkeys(files._FRAMES, never))
    assert refused(heic(claimed=(50_000, 50_000))).reason == "IMAGE_TOO_MANY_PIXELS"
    assert refused(heic(claimed=(64, 50_000))).reason == "IMAGE_ASPECT_RATIO"
    assert refused(heic(claimed=(0, 64))).reason == "IMAGE_INVALID"
    data = heic()
    assert refused(data, ImageLimits()).metadata["found"] == "HEIC"
    message = refused(data, ImageLimits()).message
    assert "convert it to JPEG" in message
    assert "extra `heif`" in message


def test_a_crop_counts_as_the_image_from_which_it_is_cut() -> None:
    part = cropped(64, 64, 5120, 5120)
    data = heic(PLAIN, 10, 10, properties=[part])
    error = refused(data, replace(LIMITS, max_pixels=1_000_000))
    assert (error.reason, error.metadata["actual"]) == ("IMAGE_TOO_MANY_PIXELS", str(5120 * 5120))
    assert "5120x5120" in error.message
    header = files.check_header(data, "f", LIMITS)
    assert (header.upright, header.file_pixels) == ((64, 64), 5120 * 5120)
    assert files.decoding_bytes(header) > 5120 * 5120 * 3  # both copies of its planes
    assert decode_image(heic(properties=[cropped(32, 32, 64, 64)]), "f", LIMITS).shape[:2] == (
        32,
        32,
    )


def test_a_header_that_claims_another_size_is_refused() -> None:
    for claimed in ((640, 640), (32, 32), (63, 64)):
        assert refused(heic(claimed=claimed)).reason == "IMAGE_INVALID"


def test_floods_are_refused() -> None:
    many = heic(properties=[box(b"free")] * 40)
    assert decode_image(many, "f", LIMITS).shape == (64, 64, 3)
    for data in (
        heic() + box(b"free") * (MAX_PARTS + 1),
        box(b"ftyp", b"heic", bytes(4), b"mif1heic")
        + full(
            b"meta",
            full(b"pitm", struct.pack(">H", 1)),
            box(
                b"iprp",
                box(b"ipco"),
                full(b"ipma", struct.pack(">I", MAX_PARTS + 1), bytes(90_000)),
            ),
        ),
    ):
        error = refused(data)
        assert error.reason == "IMAGE_INVALID"
        assert str(MAX_PARTS) in error.message


@pytest.mark.parametrize("options", [{}, {"columns": 2, "rows": 2, "properties": [turned(1)]}])
def test_every_prefix_is_refused_as_truncated_or_damaged(options: dict[str, Any]) -> None:
    data = heic(**options)
    reasons = {refused(data[:length]).reason for length in range(24, len(data) - 1, 3)}
    assert reasons <= {"IMAGE_TRUNCATED", "IMAGE_INVALID"}
    assert refused(data[:-10]).reason == "IMAGE_TRUNCATED"


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
    grid=st.booleans(),
)
def test_mutated_files_give_pixels_or_an_image_error(
    edits: list[tuple[int, int]], grid: bool
) -> None:
    data = bytearray(heic(columns=2, rows=2, exif=tiff(6)) if grid else heic())
    for at, value in edits:
        data[at % len(data)] = value
    try:
        pixels = decode_image(bytes(data), "f", ImageLimits(formats=FORMATS, max_pixels=1_000_000))
    except ImageError:
        return
    assert pixels.dtype == np.uint8


@pytest.mark.slow
async def test_a_server_that_accepts_heic() -> None:
    """A photo of 12 megapixels, beside a JPEG; without the setting it is refused by name."""
    photo = heic(PLAIN, 8, 6, size=(4032, 3024), properties=[turned(3)])
    seen = []

    class Seeing(FakeEngine):
        async def generate(self, request: Any) -> Any:
            for image in request.all_images:
                seen.append((image.width, image.height, *(await image.reduced(np.copy)).shape[:2]))
            async for chunk in super().generate(request):
                yield chunk

    async with running(Seeing(), image_formats="jpeg,heic") as started:
        request = run_request(images=[image_bytes(), photo])
        await started.stub.RunTask(request, timeout=60)
        error = await failure(
            started.stub.RunTask(run_request(images=[image_bytes(), photo[:-9]]), timeout=60)
        )
    assert seen[:2] == [(64, 48, 48, 64), (3024, 4032, 4032, 3024)]
    assert (error.reason, list(error.fields)) == ("IMAGE_TRUNCATED", ["images[1].data"])
    async with running() as started:
        error = await failure(started.stub.RunTask(run_request(images=[photo]), timeout=60))
    assert (error.reason, error.metadata["found"]) == ("IMAGE_FORMAT_UNSUPPORTED", "HEIC")


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder of cases is not there")
def test_heic_files_from_practice() -> None:
    for name in ("photo.heic", "heic_named.jpg"):
        pixels = decode_image((CASES / name).read_bytes(), "f", LIMITS)
        assert pixels.ndim == 3
        assert pixels.std() > 10
