"""Memory that decoding an image takes at its peak, beside what the server reserves for it.

``python -m benchmarks.image_memory [--megapixels 64] [NAME …]`` prints a table. Every image is decoded
in a process of its own, and its rows are read in strips, as an engine does. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from benchmarks.heic_files import PLAIN, heic, turned
from lmdeploy_ext.images.files import ImageLimits, decoding_bytes
from lmdeploy_ext.images.formats import FORMATS
from service.inference.images import check_header, decode

MB = 1e6
LIMITS = ImageLimits(
    max_bytes=1 << 40, max_pixels=1 << 40, max_request_pixels=1 << 40, formats=FORMATS
)
STRIP_PIXELS = 1 << 18


@dataclass(frozen=True)
class Figures:
    """Bytes: of the file, at the peak of its decoding, and reserved by its header."""

    encoded: int
    peak: int
    reserved: int


def scene(width: int, height: int) -> Image.Image:
    """Smooth colours with a little noise, like a photograph."""
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(0, 1, width, dtype=np.float32)[None]
    noise = np.random.default_rng(0).integers(0, 12, (height, width), dtype=np.uint8)
    planes = [
        ((x * 3 + y) % 1 * 240).astype(np.uint8),
        ((y * 5) % 1 * 240 + x * 0).astype(np.uint8),
    ]
    return Image.merge("RGB", [Image.fromarray(one + noise) for one in (*planes, planes[0])])


def _saved(kind: str, mode: str, **options: object) -> Callable[[int, int], bytes]:
    def made(width: int, height: int) -> bytes:
        image = scene(width, height)
        if mode == "P":
            image = image.quantize(64)
        elif mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200)
        elif "A" in mode:
            alpha = image.getchannel("G")
            image = image.convert(mode)
            image.putalpha(alpha)
        else:
            image = image.convert(mode)
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    return made


def _profile() -> bytes:
    """sRGB, but with the primaries of red and blue exchanged, so that pixels have to change."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def _by_hand(depth: int, colours: int, interlaced: bool) -> Callable[[int, int], bytes]:
    """A PNG file of zeros, of kinds that Pillow does not write."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colours]

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(body, zlib.crc32(kind))
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    def made(width: int, height: int) -> bytes:
        passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
        rows = 0
        for left, top, across, down in passes:
            count = max(0, -(-(width - left) // across))
            rows += max(0, -(-(height - top) // down)) * (1 + (count * channels * depth + 7) // 8)
        header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, interlaced)
        pixels = zlib.compress(bytes(rows), 1)
        parts = (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

    return made


_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
"""Left, top, step across and step down of each pass of an interlaced PNG file."""


def _animated(width: int, height: int) -> bytes:
    first, file = scene(width, height), io.BytesIO()
    frames = [first.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    first.save(
        file, "WEBP", save_all=True, append_images=frames, lossless=True, method=0, quality=0
    )
    return file.getvalue()


def _heic(*properties: bytes) -> Callable[[int, int], bytes]:
    """A grid of tiles, as phones write it."""

    def made(width: int, height: int) -> bytes:
        across, down = -(-width // PLAIN.side), -(-height // PLAIN.side)
        return heic(PLAIN, across, down, size=(width, height), properties=properties)

    return made


def _tiny(width: int, height: int) -> bytes:
    """A lossless WebP file of 36 bytes: every code has one symbol, so pixels take no bits."""
    bits = (width - 1) | (height - 1) << 14
    for at in (35, 39, 43, 47, 51):
        bits |= 1 << at
    body = b"VP8L" + struct.pack("<I", 16) + b"\x2f" + bits.to_bytes(15, "little")
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def many_groups(width: int, height: int) -> bytes:
    """A lossless WebP file of as many groups of codes as its blocks of 4x4 pixels allow, or 65,536.

    The image of groups has codes of eight bits for green and red, which number the groups.
    """
    across, down = -(-width // 4), -(-height // 4)
    groups = min(across * down, 65_536)
    single = "1000"  # simple code, one symbol of one bit: 0
    # Lengths of code: only 8 occurs, so that it takes no bits, 256 times; 0 has to end those of green.
    eights = "0" + f"{12 - 4:04b}"[::-1] + "000" * 11 + "100" + "0"
    green = "0" + f"{12 - 4:04b}"[::-1] + "000" * 11 + "100" + "1" + "110" + f"{256 - 2:08b}"[::-1]
    parts = [f"{width - 1:014b}"[::-1], f"{height - 1:014b}"[::-1], "0000"]
    parts += ["0", "0", "1", "000"]  # no transform, no cache, groups for blocks of 4x4 pixels
    parts += ["0", green, eights, single, single, single]
    for block in range(across * down):
        group = block % groups
        parts += [f"{group & 255:08b}", f"{group >> 8:08b}"]
    parts.append(single * 5 * groups)
    bits = "".join(parts)
    coded = int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")
    body = b"VP8L" + struct.pack("<I", len(coded) + 1) + b"\x2f" + coded + bytes(~len(coded) & 1)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


CASES: dict[str, Callable[[int, int], bytes]] = {
    "JPEG": _saved("JPEG", "RGB", quality=80),
    "JPEG 4:4:4": _saved("JPEG", "RGB", quality=80, subsampling=0),
    "JPEG grey": _saved("JPEG", "L", quality=80),
    "JPEG CMYK": _saved("JPEG", "CMYK", quality=80),
    "JPEG turned": _saved("JPEG", "RGB", quality=80, exif=_turned()),
    "JPEG with a profile": _saved("JPEG", "RGB", quality=80, icc_profile=_profile()),
    "progressive JPEG": _saved("JPEG", "RGB", quality=80, progressive=True),
    "progressive JPEG 4:4:4": _saved("JPEG", "RGB", quality=80, progressive=True, subsampling=0),
    "progressive JPEG 4:2:2": _saved("JPEG", "RGB", quality=80, progressive=True, subsampling=1),
    "progressive JPEG grey": _saved("JPEG", "L", quality=80, progressive=True),
    "progressive JPEG CMYK": _saved("JPEG", "CMYK", quality=80, progressive=True),
    "PNG": _saved("PNG", "RGB", compress_level=1),
    "PNG RGBA": _saved("PNG", "RGBA", compress_level=1),
    "PNG RGBA with a profile": _saved("PNG", "RGBA", compress_level=1, icc_profile=_profile()),
    "PNG grey": _saved("PNG", "L", compress_level=1),
    "PNG grey with alpha": _saved("PNG", "LA", compress_level=1),
    "PNG palette": _saved("PNG", "P", compress_level=1),
    "PNG palette, transparent": _saved("PNG", "P", compress_level=1, transparency=3),
    "PNG of 1 bit": _saved("PNG", "1", compress_level=1),
    "PNG of 16 bits": _saved("PNG", "I;16", compress_level=1),
    "PNG of 16 bits, RGB": _by_hand(16, 2, False),
    "PNG of 16 bits, RGBA": _by_hand(16, 6, False),
    "PNG of 16 bits, grey with alpha": _by_hand(16, 4, False),
    "PNG interlaced": _by_hand(8, 2, True),
    "PNG interlaced, RGBA": _by_hand(8, 6, True),
    "PNG interlaced, 16 bits": _by_hand(16, 0, True),
    "WebP": _saved("WEBP", "RGB", quality=80, method=0),
    "WebP with alpha": _saved("WEBP", "RGBA", quality=80, method=0),
    "WebP lossless": _saved("WEBP", "RGB", lossless=True, method=0, quality=0),
    "WebP lossless with alpha": _saved("WEBP", "RGBA", lossless=True, method=0, quality=0),
    "WebP lossless of 36 bytes": _tiny,
    "WebP lossless of many groups": many_groups,
    "WebP animated": _animated,
    "HEIC": _heic(),
    "HEIC turned": _heic(turned(1)),
}
"""Name -> makes the bytes of a file of (width, height)."""
HALF = " at half size"
"""Behind the name of a case: decoded with ``jpeg_scaled_pixels`` of a quarter of the pixels."""
NAMES = (*CASES, "JPEG" + HALF, "progressive JPEG" + HALF)


def measure(name: str, width: int, height: int) -> Figures:
    """Decode an image of a case in a process of its own."""
    make = CASES[name.removesuffix(HALF)]
    scaled = str(-(-width // 2) * -(-height // 2)) if name.endswith(HALF) else "0"
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "small", Path(folder) / "image"]
        files[0].write_bytes(make(64, 48))
        files[1].write_bytes(make(width, height))
        command = [
            sys.executable,
            "-m",
            "benchmarks.image_memory",
            "--child",
            *map(str, files),
            scaled,
        ]
        found = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
        )
        return Figures(**json.loads(found.stdout))


def _child(small: str, image: str, scaled: str) -> None:
    limits = replace(LIMITS, jpeg_scaled_pixels=int(scaled) or None)
    _read(Path(small).read_bytes(), limits)  # what is loaded once
    data = Path(image).read_bytes()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = _status("VmHWM")
    reserved = _read(data, limits)
    print(
        json.dumps({"encoded": len(data), "peak": _status("VmHWM") - before, "reserved": reserved})
    )


def _read(data: bytes, limits: ImageLimits) -> int:
    """Decode and read all rows in strips. Returns what the server reserves."""
    header = check_header(data, "image", limits)
    rows = decode(data, header, "image", limits)
    height, width, _ = rows.shape
    step = max(1, STRIP_PIXELS // width)
    for top in range(0, height, step):
        rows[top : top + step]
    return decoding_bytes(header)


def _status(name: str) -> int:
    """A figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megapixels", type=float, default=64)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help="default: all")
    options = parser.parse_args()
    if options.child:
        _child(*options.child)
        return
    width = round((options.megapixels * 1e6 * 4 / 3) ** 0.5)
    height = round(options.megapixels * 1e6 / width)
    print(
        f"| {width}x{height} | file, MB | peak, MB | reserved, MB | reserved / peak |\n|---|---|---|---|---|"
    )
    for name in options.names or NAMES:
        found = measure(name, width, height)
        print(
            f"| {name} | {found.encoded / MB:.1f} | {found.peak / MB:.0f} | {found.reserved / MB:.0f} | "
            f"{found.reserved / found.peak:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
