"""Image files as cameras, editors, scripts and attackers write them: shown as a browser would, or
refused with a reason that helps."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps

from benchmarks.image_memory import NAMES as MEMORY_CASES
from benchmarks.image_memory import many_groups, measure, scene
from lmdeploy_ext.images import files, formats, headers, rows, webp_lossless
from lmdeploy_ext.images.files import ImageLimits
from lmdeploy_ext.images.headers import (
    MAX_CHUNKS,
    MAX_JPEG_SCANS,
    MAX_JPEG_SEGMENTS,
    read_header,
    reads_quickly,
)
from service.errors import ImageError, Overloaded
from service.inference.images import decode_image
from tests.service.inference.test_images import (
    PHOTOS,
    VALID,
    decode,
    encoded,
    gradient,
    png_chunk,
    refused,
)

CASES = Path(__file__).parents[4] / "shared" / "cases" / "images"
BASE = gradient(64, 48)
STORED = np.asarray(BASE)


def png(*chunks: bytes, image: Image.Image = BASE, behind: bytes = b"") -> bytes:
    """A PNG file with chunks between header and pixels, and between pixels and end."""
    data = encoded(image, "PNG")
    return data[:33] + b"".join(chunks) + data[33:-12] + behind + data[-12:]


def test_which_headers_are_read_on_the_event_loop() -> None:
    """Small files of which nothing has to be decompressed: 4 MiB of a profile take 80 KiB, 20 times."""
    profile = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(4 << 20), 9))
    note = png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(1 << 20), 9))
    name = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(1 << 20), 9))
    jpeg = encoded(BASE, "JPEG")
    assert reads_quickly(png())
    assert reads_quickly(jpeg)
    assert not any(map(reads_quickly, (png(profile), png(note), png(name))))
    assert not reads_quickly(jpeg + bytes(1 << 20))
    assert not reads_quickly(encoded(BASE, "WEBP"))


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg(*segments: bytes, **options: Any) -> bytes:
    """A JPEG file with segments behind its first two bytes."""
    data = encoded(BASE, "JPEG", **options)
    return data[:2] + b"".join(segments) + data[2:]


def webp(**chunks: bytes) -> bytes:
    """A lossless WebP file with an extended header and chunks of metadata."""
    flags = 0x20 * ("ICCP" in chunks) | 0x08 * ("EXIF" in chunks) | 0x04 * ("XMP" in chunks)
    plain = encoded(BASE, "WEBP", lossless=True)
    header = bytes([flags, 0, 0, 0]) + b"".join(
        (side - 1).to_bytes(3, "little") for side in BASE.size
    )

    def chunk(name: str, body: bytes) -> bytes:
        return (
            name.ljust(4).encode() + struct.pack("<I", len(body)) + body + b"\0" * (len(body) & 1)
        )

    before = chunk("ICCP", chunks["ICCP"]) if "ICCP" in chunks else b""
    rest = b"".join(chunk(name, body) for name, body in chunks.items() if name != "ICCP")
    body = b"WEBP" + chunk("VP8X", header) + before + plain[12:] + rest
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(orientation: int, order: str = "<") -> bytes:
    """EXIF that says nothing but the orientation."""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return magic + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


def xmp(orientation: int, as_element: bool = False) -> bytes:
    said = f'tiff:Orientation="{orientation}"'
    if as_element:
        said = f"><tiff:Orientation>{orientation}</tiff:Orientation"
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description {said}/></x:xmpmeta>'.encode()


def raw_profile(kind: str, exif: bytes, compressed: bool = True) -> bytes:
    """Keyword and text, as ImageMagick writes EXIF into PNG files; older versions compress nothing."""
    digits = "\n".join(exif.hex()[at : at + 72] for at in range(0, len(exif.hex()), 72))
    text = f"\n{kind}\n{len(exif):8}\n{digits}\n"
    written = b"\0" + zlib.compress(text.encode()) if compressed else text.encode()
    return f"Raw profile type {kind}".encode() + b"\0" + written


def wrong_checksum(chunk: bytes) -> bytes:
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


@functools.cache  # it holds the time at which it was made
def swapped_profile() -> bytes:
    """sRGB, but with the primaries of red and blue exchanged."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")


# Metadata that does not matter


@pytest.mark.parametrize(
    "data",
    [
        png(png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000)))),
        png(png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(3_000_000)))),
        png(png_chunk(b"tEXt", b"Comment\0" + b"x" * 3_000_000)),
        png(png_chunk(b"iCCP", b"p\0\0" + zlib.compress(np.random.default_rng(0).bytes(1_500_000)))),
        png(png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(9_000_000)))),
        png(png_chunk(b"iCCP", b"p\0\0no zlib data")),
        png(wrong_checksum(png_chunk(b"tEXt", b"Comment\0text"))),
        png(wrong_checksum(png_chunk(b"gAMA", b"\0\0\0\1"))),
        png(wrong_checksum(png_chunk(b"eXIf", tiff(6)))),
        png(wrong_checksum(png_chunk(b"tRNS", bytes(6)))),
        png(behind=wrong_checksum(png_chunk(b"tEXt", b"Comment\0text"))),
        png(png_chunk(b"tEXt", b"no keyword")),
        png(*[png_chunk(b"tEXt", b"Key\0text")] * 5000),
        png(png_chunk(b"pHYs", b"")),
        png() + b"trailer" * 2000,
    ],
    ids=["zTXt", "iTXt", "tEXt", "iCCP noise", "iCCP bomb", "iCCP broken", "text checksum", "gAMA checksum",
         "eXIf checksum", "tRNS checksum", "checksum behind", "no keyword", "many", "pHYs", "trailer"],
)  # fmt: skip
def test_metadata_never_makes_a_png_unreadable(data: bytes) -> None:
    assert np.array_equal(decode(data), STORED)


def test_a_wrong_checksum_of_pixels_or_palette_still_counts() -> None:
    data = bytearray(encoded(BASE.quantize(16), "PNG"))
    data[data.index(b"PLTE") + 5] ^= 1
    assert refused(bytes(data)).reason == "IMAGE_INVALID"


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "stored",
    [
        lambda o: png(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(o))),
        lambda o: png(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(o, True)))),
        lambda o: png(png_chunk(b"zTXt", raw_profile("exif", tiff(o)))),
        lambda o: png(png_chunk(b"zTXt", raw_profile("APP1", b"Exif\0\0" + tiff(o, ">")))),
        lambda o: png(png_chunk(b"tEXt", raw_profile("exif", tiff(o), compressed=False))),
        lambda o: png(png_chunk(b"tEXt", b"XML:com.adobe.xmp\0" + xmp(o))),
        lambda o: png(behind=png_chunk(b"eXIf", tiff(o))),
        lambda o: webp(EXIF=tiff(o, ">")),
        lambda o: webp(XMP=xmp(o)),
    ],
    ids=["iTXt", "compressed iTXt", "raw exif", "raw APP1", "raw exif in tEXt",
         "XMP in tEXt", "eXIf behind", "WebP EXIF", "WebP XMP"],
)  # fmt: skip
def test_orientation_is_read_from_every_place(
    stored: Callable[[int], bytes], orientation: int
) -> None:
    with Image.open(io.BytesIO(png(png_chunk(b"eXIf", tiff(orientation))))) as reference:
        upright = np.asarray(ImageOps.exif_transpose(reference))
    data = stored(orientation)
    assert np.array_equal(decode(data), upright)
    assert read_header(data, "f").upright == (upright.shape[1], upright.shape[0])


def test_orientation_of_a_jpeg_in_xmp_and_of_exif_first() -> None:
    plain = decode(jpeg())
    turned = np.rot90(plain, -1)
    in_xmp = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(6))
    assert np.array_equal(decode(jpeg(in_xmp)), turned)
    in_exif = segment(0xE1, b"Exif\0\0" + tiff(1))
    assert np.array_equal(decode(jpeg(in_xmp, in_exif)), plain)
    assert np.array_equal(decode(jpeg(segment(0xE1, b"Exif\0\0" + tiff(9)))), plain)


# Colour profiles


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_colours_of_another_profile_become_srgb(kind: str) -> None:
    swapped = Image.fromarray(np.ascontiguousarray(STORED[..., ::-1]))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0}
    pixels = decode(encoded(swapped, kind, icc_profile=swapped_profile(), **options))
    assert np.abs(pixels.astype(int) - STORED).max() <= (6 if kind == "JPEG" else 2)


def test_a_profile_of_srgb_changes_no_bit() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("JPEG", "PNG"):
        assert np.array_equal(
            decode(encoded(BASE, kind, icc_profile=srgb)), decode(encoded(BASE, kind))
        )


@pytest.mark.parametrize("profile", [b"no profile", bytes(200), swapped_profile()[:300]])
def test_a_broken_profile_is_ignored(profile: bytes) -> None:
    assert np.array_equal(decode(encoded(BASE, "PNG", icc_profile=profile)), STORED)


def test_a_profile_of_another_colour_space_is_ignored() -> None:
    grey = BASE.convert("L")
    data = encoded(grey, "PNG", icc_profile=swapped_profile())
    assert np.array_equal(decode(data), np.asarray(grey.convert("RGB")))


def test_transparent_parts_of_a_profiled_image_lie_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 255, 255))
    image.putpixel((1, 0), (9, 9, 9, 0))
    pixels = decode(encoded(image, "PNG", icc_profile=swapped_profile()))
    assert np.abs(pixels.astype(int) - [[[255, 0, 0], [255, 255, 255]]]).max() <= 2


# Strips


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA", "I;16"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_image_is_converted_in_strips_like_a_small_one(
    mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20)
    elif mode == "P":
        image = BASE.quantize(16)
    else:
        image = BASE.convert(mode)
        if "A" in mode:
            image.putalpha(BASE.getchannel("R"))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    whole = decode(data)
    monkeypatch.setattr(rows, "STRIP_PIXELS", 64 * 5)
    assert np.array_equal(decode(data), whole)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_any_rows_of_an_image_can_be_read_alone(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(BASE, kind, exif=exif, **options)
    limits = ImageLimits()
    found = files.decode(data, files.check_header(data, "f", limits), "f", limits)
    whole = found[:]
    assert found.shape == whole.shape
    assert np.array_equal(np.asarray(found), decode(data))
    for top, bottom in ((0, 1), (5, 17), (whole.shape[0] - 3, whole.shape[0] + 9), (7, 7)):
        assert np.array_equal(found[top:bottom], whole[top:bottom])


# Floods


class Never:
    """In place of a decoder: the file has to be refused before."""

    def __init__(self, data: bytes, header: object) -> None:
        pytest.fail("a decoder has seen the file")


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_FRAMES", dict.fromkeys(files._FRAMES, Never))


FLOODS = {
    "JPEG segments": (jpeg(segment(0xFE, b"") * (MAX_JPEG_SEGMENTS + 1)), "segments"),
    "JPEG restarts": (jpeg(b"\xff\xd0" * (MAX_JPEG_SEGMENTS + 1)), "segments"),
    "JPEG filling": (jpeg(b"\xff" * 1_000_000), "damaged header"),
    "JPEG junk": (jpeg(segment(0xFE, b""), b"\0" * 1_000_000), "damaged header"),
    "PNG chunks": (png(png_chunk(b"abCd", b"") * (MAX_CHUNKS + 1)), "chunks"),
    "PNG chunks behind": (png(behind=png_chunk(b"abCd", b"") * (MAX_CHUNKS + 1)), "chunks"),
    "WebP chunks": (webp(XMP=b"")[:-8] + b"abcd\0\0\0\0" * (MAX_CHUNKS + 1), "chunks"),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_parts_is_refused_before_a_decoder_sees_it(name: str, no_decoder: None) -> None:
    data, word = FLOODS[name]
    error = refused(data)
    assert error.reason == "IMAGE_INVALID"
    assert word in error.message


def test_bytes_of_filling_take_time_in_proportion_to_their_number() -> None:
    """2 MB of them took hours. In a process of its own, because nothing interrupts a search."""
    program = (
        "from lmdeploy_ext.images.errors import ImageRefused\n"
        "from lmdeploy_ext.images.headers import read_header\n"
        "for data in (b'\\xff\\xd8' + b'\\xff' * 2_000_000,\n"
        "             b'\\xff\\xd8' + b'\\xff' * 2_000_000 + b'\\0' * 9):\n"
        "    try:\n"
        "        read_header(data, 'f')\n"
        "    except ImageRefused as error:\n"
        "        print(error.reason)\n"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)
    assert found.stdout.split() == ["IMAGE_TRUNCATED"] * 2, found.stderr


def test_one_chunk_of_each_kind_is_decompressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of them, of a few KB each, took minutes."""
    inflated = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(zlib, name)

        def decompressobj(self) -> Any:
            inflated.append(1)
            return zlib.decompressobj()

    monkeypatch.setattr(headers, "zlib", Counting())
    kinds = [
        png_chunk(b"iCCP", b"p\0\0" + zlib.compress(swapped_profile())),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(1))),
        png_chunk(b"zTXt", raw_profile("exif", b"")),
        png_chunk(b"zTXt", raw_profile("APP1", b"Exif\0\0" + tiff(6))),
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"text")),
    ]
    header = read_header(png(*kinds * 500), "f")
    assert len(inflated) == 4
    assert (header.orientation, header.icc) == (6, swapped_profile())


def test_repeated_prefixes_of_exif_are_not_copied() -> None:
    """A file of 20 MB of them was copied three million times, and kept once more."""

    class Watched(bytes):
        sliced = 0

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            if isinstance(key, slice):
                Watched.sliced += len(found)
                return Watched(found)
            return found

    flood = Watched(b"Exif\0\0" * 2000 + tiff(6))
    assert headers._exif_orientation(flood) == 6
    assert Watched.sliced < 3 * len(flood)
    data = jpeg(segment(0xE1, b"Exif\0\0" + b"Exif\0\0" * 10_000) * 100)
    tracemalloc.start()
    try:
        assert read_header(data, "f").orientation == 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * headers._MAX_METADATA < len(data)


def scan_flood(progressive: bool) -> bytes:
    """The last scan of a file, again and again; for a baseline file, scans of one component."""
    if progressive:
        data = VALID["progressive"]
        last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
        return data[:end] + data[last:end] * MAX_JPEG_SCANS + data[end:]
    data = VALID["jpeg"]
    at = data.index(b"\xff\xda")
    scan = segment(0xDA, bytes([1, 1, 0, 0, 63, 0])) + b"\0\0"
    return data[:at] + scan * (MAX_JPEG_SCANS + 1) + b"\xff\xd9"


@pytest.mark.parametrize("progressive", [True, False])
def test_many_scans_are_refused(progressive: bool, no_decoder: None) -> None:
    error = refused(scan_flood(progressive))
    assert (error.reason, "scans" in error.message) == ("IMAGE_INVALID", True)


def test_a_comment_does_not_hide_scans(no_decoder: None) -> None:
    """It holds the marker of the end, which ends nothing there."""
    data = VALID["progressive"]
    at = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", at + 2)
    tables = data.rfind(b"\xff\xc4", at, second)
    comment = segment(0xFE, b"\xff\xd9")
    flood = scan_flood(True)
    assert "scans" in refused(flood[:tables] + comment + flood[tables:]).message


@pytest.mark.parametrize("name", ["jpeg", "progressive"])
def test_data_after_the_end_of_a_jpeg_is_ignored(name: str) -> None:
    """Phones append a second image or a video; its markers are not those of the first."""
    data = VALID[name]
    assert np.array_equal(decode(data + b"\xff\xda\0\0" * 500), decode(data))
    assert np.array_equal(decode(data + b"video" * 5000), decode(data))


# Truncated or damaged


@pytest.mark.parametrize("name", ["jpeg", "png", "webp"])
def test_a_damaged_file_with_a_trailer_is_not_called_truncated(name: str) -> None:
    data = bytearray(VALID[name])
    if name == "png":
        data[data.index(b"IDAT") + 8] ^= 0xFF
    elif name == "webp":
        data[23:26] = bytes(3)  # its start code
    else:  # its tables of quantisation become comments
        while (at := data.find(b"\xff\xdb")) >= 0:
            data[at + 1] = 0xFE
    assert refused(bytes(data)).reason == "IMAGE_INVALID"
    assert refused(bytes(data) + b"\0" * 5000).reason == "IMAGE_INVALID"


def test_an_end_marker_inside_metadata_is_ignored() -> None:
    thumbnail = segment(0xE1, b"thumbnail" + VALID["jpeg"])
    data = jpeg(thumbnail)
    assert refused(data[: data.rindex(b"\xff\xda") + 40]).reason == "IMAGE_TRUNCATED"
    assert refused(data[: len(thumbnail) - 100]).reason == "IMAGE_TRUNCATED"


def test_text_is_told_from_base64_without_backtracking() -> None:
    """Any pattern that can match a space in two ways takes quadratic time on text of spaces."""
    assert formats._BASE64.fullmatch(b"a b") is None
    for data in (b"iVBO" + b" " * 4000 + b"!", b"a" * 2000 + b" \n" * 1000 + b"="):
        assert refused(data).reason == "IMAGE_FORMAT_UNSUPPORTED"
    spaced = b"\n ".join(base64.b64encode(VALID["png"])[at : at + 60] for at in range(0, 600, 60))
    assert refused(b"  " + spaced + b" \n" * 900).metadata["found"] == "base64 text of PNG"


# Formats that are not accepted

FTYP = struct.pack(">I", 24) + b"ftyp"
OTHERS: dict[str, tuple[bytes, str]] = {
    "HEIC": (FTYP + b"heic\0\0\0\0mif1heic", "convert it to JPEG"),
    "HEIC by a compatible brand": (FTYP + b"mif1\0\0\0\0mif1heic", "HEIC"),
    "AVIF": (FTYP + b"avif\0\0\0\0avifmif1", "convert it to JPEG"),
    "a video": (FTYP + b"isom\0\0\0\0isommp42", "video"),
    "GIF": (encoded(BASE, "GIF"), "save a frame as PNG"),
    "BMP": (encoded(BASE, "BMP"), "convert it to PNG"),
    "TIFF": (encoded(BASE, "TIFF"), "convert it to PNG"),
    "ICO": (encoded(BASE, "ICO"), "convert it to PNG"),
    "PDF": (b"%PDF-1.7\n", "render its pages to PNG"),
    "PostScript": (b"%!PS-Adobe", "render it"),
    "SVG": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "render it to PNG"),
    "HTML": (b"\n<!DOCTYPE html><html>", "an HTML page"),
    "JSON": (b'{"error": "not found"}', "JSON text"),
    "a URL": (b"https://example.org/cat.jpg", "send the bytes of the file"),
    "data URL": (b"data:image/png;base64," + base64.b64encode(VALID["png"]), "a data URL"),
    "base64": (base64.encodebytes(VALID["jpeg"]), "base64 text of JPEG"),
    "base64 for URLs": (base64.urlsafe_b64encode(VALID["png"]), "base64 text of PNG"),
    "base64 of HEIC": (base64.b64encode(FTYP + b"heic\0\0\0\0mif1heic"), "base64 text of HEIC"),
    "JPEG XL": (b"\xff\x0a" + bytes(20), "convert it to JPEG"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", "convert it to JPEG"),
    "Netpbm": (encoded(BASE, "PPM"), "convert it to PNG"),
    "gzip": (b"\x1f\x8b\x08" + bytes(10), "decompress it"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_refusal_names_the_format_and_what_to_do(name: str) -> None:
    data, words = OTHERS[name]
    error = refused(data)
    assert error.reason == "IMAGE_FORMAT_UNSUPPORTED"
    assert words in error.message
    assert "JPEG, PNG and WebP" in error.message
    assert error.metadata["found"] in error.message


def test_formats_can_be_left_out() -> None:
    only_png = ImageLimits(formats=("PNG",))
    assert decode(VALID["png"], only_png).shape == (24, 40, 3)
    error = refused(VALID["jpeg"], only_png)
    assert (error.reason, error.metadata["found"]) == ("IMAGE_FORMAT_UNSUPPORTED", "JPEG")
    assert "is JPEG" in error.message
    assert "convert it to PNG" in error.message
    assert "image_formats" in error.message
    assert "(accepted are PNG)" in error.message
    assert "convert it to WebP" in refused(VALID["png"], ImageLimits(formats=("WebP",))).message
    assert (
        "convert it to JPEG" in refused(VALID["webp"], ImageLimits(formats=("JPEG", "PNG"))).message
    )


# Background


def test_transparent_parts_get_the_colour_of_the_background() -> None:
    limits = ImageLimits(background=(10, 200, 30))
    image = Image.new("RGBA", (2, 1), (100, 100, 100, 255))
    image.putpixel((0, 0), (10, 20, 30, 0))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        assert decode(encoded(image, kind, **options), limits).tolist() == [
            [[10, 200, 30], [100, 100, 100]]
        ]
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 51))
    assert decode(encoded(half, "PNG"), limits).tolist() == [[[8, 160, 24]]]
    profiled = encoded(image, "PNG", icc_profile=swapped_profile())
    assert decode(profiled, limits).tolist()[0][0] == [10, 200, 30]
    data = encoded(Image.fromarray(np.array([[257, 514]], np.uint16)), "PNG")
    end = data.index(b"IDAT") - 4
    data = data[:end] + png_chunk(b"tRNS", struct.pack(">H", 257)) + data[end:]
    assert decode(data, limits).tolist() == [[[10, 200, 30], [2, 2, 2]]]


# JPEG at a part of its size


@pytest.mark.parametrize(
    ("width", "height", "bound", "scale"),
    [
        (64, 48, 3072, 1), (64, 48, 3071, 2), (63, 47, 32 * 24, 2), (63, 47, 32 * 24 - 1, 4),
        (64, 48, 16 * 12, 4), (65, 49, 16 * 12, 8), (640, 480, 1, 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(
    width: int, height: int, bound: int, scale: int, mode: str, progressive: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = gradient(width, height).convert(mode)
    data = encoded(image, "JPEG", quality=95, progressive=progressive, exif=exif)
    limits = ImageLimits(jpeg_scaled_pixels=bound)
    header = files.check_header(data, "f", limits)
    assert header.scale == scale
    assert header.upright == (-(-height // scale), -(-width // scale))
    assert abs(header.file_pixels - width * height) <= 8 * (width + height) + 64
    pixels = decode(data, limits)
    assert pixels.shape == (header.upright[1], header.upright[0], 3)
    stored = Image.fromarray(np.rot90(decode(data)))
    assert np.abs(np.rot90(pixels).astype(int) - np.asarray(stored.reduce(scale))).mean() < 3


def test_other_formats_and_the_default_are_decoded_in_full() -> None:
    limits = ImageLimits(jpeg_scaled_pixels=10)
    for name in ("png", "webp", "palette"):
        assert decode(VALID[name], limits).shape == (24, 40, 3)
    assert decode(VALID["jpeg"]).shape == (24, 40, 3)


def test_a_jpeg_above_the_limit_is_accepted_where_it_is_scaled() -> None:
    limits = ImageLimits(max_pixels=240, jpeg_scaled_pixels=240)
    assert decode(VALID["jpeg"], limits).shape == (12, 20, 3)
    error = refused(VALID["jpeg"], replace(limits, max_pixels=239, jpeg_scaled_pixels=100))
    assert error.reason == "IMAGE_TOO_MANY_PIXELS"
    assert error.metadata == {"limit": "956", "actual": "960"}
    assert refused(VALID["png"], limits).metadata["limit"] == "240"
    assert (
        refused(VALID["jpeg"], replace(limits, jpeg_scaled_pixels=None)).metadata["limit"] == "240"
    )


# Memory


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading")])
def test_too_little_memory_is_not_an_image_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: object) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    if not isinstance(error, MemoryError):  # what libjpeg and libwebp make of it

        def nothing_left(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(files.np, "empty", nothing_left)
    with pytest.raises(Overloaded) as caught:
        decode_image(VALID["jpeg"], "images[0].data", ImageLimits())
    assert caught.value.retry_after_s > 0
    assert caught.value.__context__ is None


def reserved(data: bytes) -> int:
    return files.decoding_bytes(read_header(data, "f"))


@pytest.mark.slow
def test_groups_of_codes_of_a_webp_file_are_reserved() -> None:
    """libwebp took 380 MB for a file of 1024x1024 pixels, for which 22 MB were reserved."""
    data, tables = many_groups(1024, 1024), 65_536 * 5_700
    assert decode(data).shape == (1024, 1024, 3)
    assert reserved(data) > tables
    plain = data[12:]
    size = (1023).to_bytes(3, "little") * 2
    extended = b"WEBPVP8X" + struct.pack("<II", 10, 0) + size + plain
    assert reserved(b"RIFF" + struct.pack("<I", len(extended)) + extended) > tables
    # A lossless channel of alpha has the same codes, behind one byte and without the size.
    alpha = b"\1" + plain[13:]
    alpha = b"ALPH" + struct.pack("<I", len(alpha)) + alpha + b"\0" * (len(alpha) & 1)
    extended = b"WEBPVP8X" + struct.pack("<II", 10, 0x10) + size + alpha + VALID["webp"][12:]
    assert reserved(b"RIFF" + struct.pack("<I", len(extended)) + extended) > tables
    frame = bytes(6) + size + bytes(4) + plain
    frame = b"ANMF" + struct.pack("<I", len(frame)) + frame
    extended = b"WEBPVP8X" + struct.pack("<II", 10, 2) + size + frame
    assert reserved(b"RIFF" + struct.pack("<I", len(extended)) + extended) > tables


@pytest.mark.slow
def test_ordinary_webp_files_reserve_little_for_groups() -> None:
    for width, height in ((40, 24), (640, 480), (1000, 750)):
        for image in (scene(width, height), scene(width, height).quantize(12).convert("RGBA")):
            data = encoded(image, "WEBP", lossless=True, method=4, quality=60)
            assert 0 < headers._webp_tables(data) < 25_000_000


def test_the_search_for_groups_takes_a_bounded_number_of_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A transform has an image of 16 million pixels, of a bit each, before the groups."""
    simple = "1000"
    bits = "100000" + "0" + "111" + f"{0:08b}" + f"{1:08b}"[::-1] + simple * 4
    start = int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")
    reader = webp_lossless._Reader(start + bytes(3_000_000))
    with pytest.raises(webp_lossless._Unknown):
        reader.blocks(16_000, 16_000)
    assert reader._steps == webp_lossless._MAX_STEPS + 1
    counted = itertools.count()
    monkeypatch.setattr(headers, "table_bytes", lambda *_: next(counted))
    header = b"VP8X" + struct.pack("<I", 10) + bytes(10)
    flood = b"WEBP" + header + (b"ALPH" + struct.pack("<I", 2) + b"\1\0") * 1000
    read_header(b"RIFF" + struct.pack("<I", len(flood)) + flood, "f")
    assert next(counted) == 1
    most = webp_lossless.table_bytes(start + bytes(3_000_000), 16_000, 16_000)
    assert most > 65_536 * 5_700


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process in /proc")
@pytest.mark.parametrize("name", MEMORY_CASES)
@pytest.mark.slow
def test_the_estimate_is_never_below_the_memory_that_decoding_takes(name: str) -> None:
    """And at most twice as much. Measured at 16 megapixels, in a process of its own.

    libheif's threads decide how much of a HEIC image is in memory at the same time: three times.
    """
    found = measure(name, 4608, 3456)
    most = 3 if name.startswith("HEIC") else 2
    assert found.peak <= found.reserved <= most * found.peak, found


# Cases from practice, and photographs


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder of cases is not there")
def test_image_files_from_practice() -> None:
    base = decode((CASES / "base.png").read_bytes())
    for name in ("text_zTXt", "badcrc_text", "bigicc", "rawexif6"):
        assert np.array_equal(decode((CASES / f"{name}.png").read_bytes()), base), name
    swapped = decode((CASES / "icc_swapped.png").read_bytes()).astype(int)
    assert np.abs(swapped - base).max() <= 2
    for name, found in (
        ("photo.heic", "HEIC"), ("heic_named.jpg", "HEIC"), ("tiff.tif", "TIFF"), ("anim.gif", "GIF"),
        ("b64.txt", "base64 text of PNG"),
    ):  # fmt: skip
        assert refused((CASES / name).read_bytes()).metadata["found"] == found
    with Image.open(CASES / "whitelogo.png") as logo:
        white = Image.new("RGBA", logo.size, "white")
        shown = np.asarray(Image.alpha_composite(white, logo.convert("RGBA")).convert("RGB"))
    assert np.array_equal(decode((CASES / "whitelogo.png").read_bytes()), shown)
    large = (CASES / "63mp.png").read_bytes()
    assert read_header(large, "f").upright == (9000, 7000)
    assert refused(large, ImageLimits(max_pixels=62_000_000)).reason == "IMAGE_TOO_MANY_PIXELS"


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the folder of photographs is not there")
def test_photographs_are_bit_identical_to_pillow() -> None:
    for path in sorted(PHOTOS.iterdir()):
        with Image.open(path) as reference:
            assert np.array_equal(decode(path.read_bytes()), np.asarray(reference.convert("RGB")))


def test_errors_keep_no_frames_in_memory() -> None:
    """What Pillow raises holds its frames, and they hold images."""
    for data in (VALID["png"][:-60], VALID["jpeg"][:-100]):
        with pytest.raises(ImageError) as caught:
            decode_image(data, "images[0].data", ImageLimits())
        assert caught.value.__context__ is None
