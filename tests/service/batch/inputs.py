"""Inputs of batches: drawings that the bundled model knows, damaged images, and folders with both."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from examples.drawings.scenes import HELD_OUT_SEED, draw, scene


def drawing(number: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    draw(scene(HELD_OUT_SEED + number), HELD_OUT_SEED + number, size).save(file, "PNG")
    return file.getvalue()


def damaged() -> dict[str, bytes]:
    """Reason that a call gets -> the bytes of such an image."""
    png = drawing(0)
    return {
        "IMAGE_EMPTY": b"",
        "IMAGE_FORMAT_UNSUPPORTED": b"GIF89a" + bytes(40),
        "IMAGE_TRUNCATED": png[: len(png) // 2],
        "IMAGE_INVALID": png[:-40] + bytes(28) + png[-12:],
    }


def write_parquet(path: Path, images: Sequence[bytes | None], group: int = 4) -> None:
    """Columns ``id`` and ``image``."""
    table = pa.table({"id": range(len(images)), "image": pa.array(images, pa.binary())})
    pq.write_table(table, path, row_group_size=group)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
