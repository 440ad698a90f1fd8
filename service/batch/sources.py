"""The input of a run: Parquet files, folders of images, or WebDataset tars, cut into pieces.

The driver lists the input and cuts it; a piece is small and says where its rows are. Each piece is read
where it is answered, a few rows at a time. The same input is always cut the same way.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from service.batch.errors import BatchError
from service.batch.places import URI, absolute, files_below, opened
from service.errors import ImageError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".heic", ".heif", ".gif", ".bmp", ".tif", ".tiff", ".avif")
)  # fmt: skip
"""Files with these endings are rows of a folder or a tar, also those in formats that are refused."""
ROWS_AT_ONCE = 16
"""Rows of a Parquet file that are in memory before they are answered."""
READ_BUFFER_BYTES = 1 << 20

Load = Callable[[], bytes]
"""Reads the bytes of an image, at most so many that the limit of the service refuses them. Raises
``ImageError`` for a file that cannot be read."""


@dataclass(frozen=True)
class InputOptions:
    """How the input is read.

    kind: "parquet", "images" or "tars"; None: by the names of the files.
    image_column: Parquet column with the bytes of an image, with a list of them, or with structs that
        have a field ``bytes``; None: the only such column.
    path_column: Parquet column with paths or URIs instead.
    root: folder of relative paths; None: the folder of the input.
    keep: Parquet columns that the output has too; None: all but image_column.
    """

    where: str
    kind: str | None = None
    image_column: str | None = None
    path_column: str | None = None
    root: str | None = None
    keep: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Rows:
    """Some rows: a table of their keys, and for each row the images to load."""

    keys: pa.Table
    images: list[list[Load]]


class Piece(Protocol):
    """Consecutive rows of the input."""

    @property
    def rows(self) -> int: ...

    def read(self, most_bytes: int) -> Iterator[Rows]:
        """The rows in order. most_bytes: limit on the size of an image; of a larger one, one byte
        more than that is read."""
        ...


@dataclass(frozen=True)
class Source:
    """The listed input.

    files: what tells this input from another one: a line for each file.
    key_schema: schema of the tables of keys.
    skipped: number of files that are no images.
    """

    files: list[str]
    key_schema: pa.Schema
    pieces: list[Piece]
    kind: str
    skipped: int = 0


def list_input(options: InputOptions, rows_per_piece: int) -> Source:
    """List the input and cut it. Raises ``BatchError`` for an input that cannot be used."""
    root, files = files_below(options.where)
    columns = (options.image_column, options.path_column, options.root, options.keep)
    kind = options.kind or ("parquet" if any(columns[:2]) else _kind_of(options.where, files))
    if kind != "parquet" and any(one is not None for one in columns):
        raise BatchError(f"columns are options of Parquet files, and {options.where} has {kind}")
    source = _CUTTERS[kind](options, root, files, rows_per_piece)
    if not source.pieces:
        raise BatchError(f"{options.where} has no rows: no {_NAMES[kind]} in it")
    return source


_NAMES = {"parquet": "row of a Parquet file", "images": "image file", "tars": "sample of a tar"}


def _kind_of(where: str, files: Sequence[Any]) -> str:
    kinds = {
        "parquet": any(_suffix(one.path) == ".parquet" for one in files),
        "tars": any(_suffix(one.path) == ".tar" for one in files),
        "images": any(_suffix(one.path) in IMAGE_SUFFIXES for one in files),
    }
    found = [kind for kind, is_there in kinds.items() if is_there]
    if len(found) == 1:
        return found[0]
    if any(one.path.endswith((".tar.gz", ".tgz", ".tar.zst")) for one in files):
        raise BatchError(
            f"{where} has compressed tars, which cannot be read in pieces: unpack them"
        )
    if not found:
        raise BatchError(f"{where} has no Parquet files (.parquet), tars (.tar) or images")
    raise BatchError(f"{where} has {' and '.join(found)}; choose with --input-kind")


def _suffix(path: str) -> str:
    name = path.rpartition("/")[2]
    return name[name.rfind(".") :].lower() if "." in name else ""


def _line(name: str, info: Any, rows: int) -> str:
    return f"{name} {info.size} {info.mtime_ns} {rows}"


# Folders of images


@dataclass(frozen=True)
class ImageFiles:
    """Image files below a folder. Key: ``path``, relative to the folder."""

    place: str
    root: str
    paths: tuple[str, ...]

    @property
    def rows(self) -> int:
        return len(self.paths)

    def read(self, most_bytes: int) -> Iterator[Rows]:
        filesystem = opened(self.place)[0]
        yield Rows(
            pa.table({"path": pa.array(self.paths, pa.string())}),
            [
                [partial(_bytes_of, filesystem, f"{self.root}/{path}", most_bytes)]
                for path in self.paths
            ],
        )


def _cut_images(options: InputOptions, root: str, files: Sequence[Any], most: int) -> Source:
    images = [one for one in files if _suffix(one.path) in IMAGE_SUFFIXES]
    names = [one.path[len(root) + 1 :] for one in images]
    pieces = [
        ImageFiles(options.where, root, tuple(names[start : start + most]))
        for start in range(0, len(names), most)
    ]
    lines = [_line(name, one, 1) for name, one in zip(names, images, strict=True)]
    schema = pa.schema([pa.field("path", pa.string())])
    return Source(lines, schema, list(pieces), "images", len(files) - len(images))


# WebDataset tars


@dataclass(frozen=True)
class Sample:
    """A sample of a tar: its key, and where the bytes of its image are. size 0: it has no image."""

    key: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarSamples:
    """Samples of one tar. Keys: ``tar``, its path relative to the folder, and ``key``."""

    place: str
    path: str
    name: str
    samples: tuple[Sample, ...]

    @property
    def rows(self) -> int:
        return len(self.samples)

    def read(self, most_bytes: int) -> Iterator[Rows]:
        filesystem = opened(self.place)[0]
        keys = {
            "tar": pa.array([self.name] * self.rows, pa.string()),
            "key": pa.array([one.key for one in self.samples], pa.string()),
        }
        load = partial(_bytes_within, filesystem, self.path, most_bytes)
        yield Rows(pa.table(keys), [[partial(load, one)] for one in self.samples])


def _cut_tars(options: InputOptions, root: str, files: Sequence[Any], most: int) -> Source:
    filesystem = opened(options.where)[0]
    tars = [one for one in files if _suffix(one.path) == ".tar"]
    lines: list[str] = []
    pieces: list[Piece] = []
    for tar in tars:
        name = tar.path[len(root) + 1 :]
        samples = _samples(filesystem, tar.path)
        lines.append(_line(name, tar, len(samples)))
        pieces += [
            TarSamples(options.where, tar.path, name, tuple(samples[start : start + most]))
            for start in range(0, len(samples), most)
        ]
    schema = pa.schema([pa.field("tar", pa.string()), pa.field("key", pa.string())])
    return Source(lines, schema, pieces, "tars")


def _samples(filesystem: Any, path: str) -> list[Sample]:
    """The samples of a tar: consecutive files of one name up to its first dot."""
    try:
        with filesystem.open_input_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = [
                (*_key_and_suffix(one.name), one.offset_data, one.size)
                for one in tar
                if one.isreg()
            ]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BatchError(f"{path} is not a complete tar file: {error}") from None
    found = []
    for key, group in groupby(members, key=lambda member: member[0]):
        images = [(offset, size) for _, suffix, offset, size in group if suffix in IMAGE_SUFFIXES]
        found.append(Sample(key, *(images[0] if images else (0, 0))))
    return found


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0], _suffix(base)


# Parquet


@dataclass(frozen=True)
class ImageColumn:
    """The column of images. kind: "bytes", "struct" (a field ``bytes``), "list" (of bytes), "path"."""

    name: str
    kind: str
    root: str = ""

    @property
    def read(self) -> str:
        return f"{self.name}.bytes" if self.kind == "struct" else self.name


@dataclass(frozen=True)
class ParquetRows:
    """Rows ``start`` to ``stop`` of a Parquet file."""

    place: str
    path: str
    start: int
    stop: int
    image: ImageColumn
    keep: tuple[str, ...]

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def read(self, most_bytes: int) -> Iterator[Rows]:
        filesystem = opened(self.place)[0]
        columns = list(dict.fromkeys((*self.keep, self.image.read)))
        with filesystem.open_input_file(self.path) as source:
            # Without pre-buffering, and with a buffer, a column is read in pieces, however long.
            file = pq.ParquetFile(source, pre_buffer=False, buffer_size=READ_BUFFER_BYTES)
            groups, position = self._groups(file.metadata)
            batches = file.iter_batches(
                ROWS_AT_ONCE, row_groups=groups, columns=columns, use_threads=False
            )
            for batch in batches:
                first, last = (
                    max(self.start - position, 0),
                    min(self.stop - position, batch.num_rows),
                )
                position += batch.num_rows
                if first < last:
                    yield self._rows(
                        pa.Table.from_batches([batch.slice(first, last - first)]), most_bytes
                    )
                if position >= self.stop:
                    return

    def _groups(self, metadata: Any) -> tuple[list[int], int]:
        """The row groups with these rows, and the number of the first row in them."""
        groups: list[int] = []
        begin = position = 0
        for number in range(metadata.num_row_groups):
            end = position + metadata.row_group(number).num_rows
            if end > self.start and position < self.stop:
                begin = begin if groups else position
                groups.append(number)
            position = end
        return groups, begin

    def _rows(self, table: pa.Table, most_bytes: int) -> Rows:
        values: list[Any] = table.column(self.image.name).to_pylist()
        images: list[list[Load]]
        if self.image.kind == "path":
            images = [[partial(_at_path, value, self.image.root, most_bytes)] for value in values]
        elif self.image.kind == "list":
            images = [[partial(_given, one) for one in value or ()] for value in values]
        else:
            given = (
                value and value["bytes"] if self.image.kind == "struct" else value
                for value in values
            )
            images = [[partial(_given, one)] for one in given]
        return Rows(table.select(list(self.keep)), images)


def _cut_parquet(options: InputOptions, root: str, files: Sequence[Any], most: int) -> Source:
    filesystem = opened(options.where)[0]
    lines: list[str] = []
    pieces: list[Piece] = []
    schema: pa.Schema | None = None
    image = ImageColumn("", "")
    keep: tuple[str, ...] = ()
    for info in (one for one in files if _suffix(one.path) == ".parquet"):
        name = info.path[len(root) + 1 :]
        try:
            with filesystem.open_input_file(info.path) as source:
                file = pq.ParquetFile(source)
                rows, found = file.metadata.num_rows, file.schema_arrow
        except (pa.ArrowInvalid, OSError) as error:
            raise BatchError(f"{info.path} is not a Parquet file: {error}") from None
        if schema is None:
            schema = found
            image = _image_column(options, found, root)
            keep = _kept(options, found, image)
        elif _types(found, (*keep, image.name)) != _types(schema, (*keep, image.name)):
            raise BatchError(f"{name} has other columns or types than the Parquet files before it")
        lines.append(_line(name, info, rows))
        pieces += [
            ParquetRows(options.where, info.path, start, min(start + most, rows), image, keep)
            for start in range(0, rows, most)
        ]
    kept = pa.schema([schema.field(one) for one in keep]) if schema is not None else pa.schema([])
    return Source(lines, kept.remove_metadata(), pieces, "parquet")


def _types(schema: pa.Schema, names: Iterable[str]) -> list[Any]:
    return [schema.field(name).type if name in schema.names else None for name in names]


def _image_column(options: InputOptions, schema: pa.Schema, root: str) -> ImageColumn:
    if options.image_column is not None and options.path_column is not None:
        raise BatchError("give --image-column or --path-column, not both")
    if options.path_column is not None:
        _check_column(options.path_column, schema)
        kind = schema.field(options.path_column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise BatchError(f"the column {options.path_column} has {kind}, not paths as text")
        folder = absolute(options.root) if options.root else _scheme(options.where) + root
        return ImageColumn(options.path_column, "path", folder)
    if options.image_column is not None:
        _check_column(options.image_column, schema)
        kind = schema.field(options.image_column).type
        if (how := _image_kind(kind)) is None:
            raise BatchError(f"the column {options.image_column} has {kind}, not bytes of images")
        return ImageColumn(options.image_column, how)
    found = [(one.name, how) for one in schema if (how := _image_kind(one.type)) is not None]
    if len(found) == 1:
        return ImageColumn(*found[0])
    many = "several columns with bytes" if found else "no column with bytes"
    raise BatchError(
        f"the Parquet files have {many}; name the column of the images with --image-column, or one of "
        f"paths with --path-column. Columns: {', '.join(schema.names)}"
    )


def _scheme(where: str) -> str:
    found = URI.match(where)
    return found[0] if found else ""


def _image_kind(kind: Any) -> str | None:
    if _is_bytes(kind):
        return "bytes"
    if pa.types.is_struct(kind):
        names = [kind.field(index).name for index in range(kind.num_fields)]
        return "struct" if "bytes" in names and _is_bytes(kind.field("bytes").type) else None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return "list" if _is_bytes(kind.value_type) else None
    return None


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _kept(options: InputOptions, schema: pa.Schema, image: ImageColumn) -> tuple[str, ...]:
    if options.keep is None:
        return tuple(name for name in schema.names if name != image.name or image.kind == "path")
    for name in options.keep:
        _check_column(name, schema)
    if image.kind != "path" and image.name in options.keep:
        raise BatchError(f"--keep {image.name}: the column of the images is not kept")
    return tuple(dict.fromkeys(options.keep))


def _check_column(name: str, schema: pa.Schema) -> None:
    if name not in schema.names:
        raise BatchError(f"there is no column {name}; there are {', '.join(schema.names)}")


_CUTTERS: dict[str, Callable[[InputOptions, str, Sequence[Any], int], Source]] = {
    "parquet": _cut_parquet,
    "images": _cut_images,
    "tars": _cut_tars,
}


# Bytes of images


def _given(data: bytes | None) -> bytes:
    return data or b""


def _at_path(path: str | None, root: str, most_bytes: int) -> bytes:
    """The bytes of a file that a column names; relative paths are below ``root``."""
    if not path:
        return b""
    place = path if path.startswith("/") or URI.match(path) else f"{root}/{path}"
    try:
        filesystem, inner = opened(place)
    except BatchError:
        raise _unreadable() from None
    return _bytes_of(filesystem, inner, most_bytes)


def _bytes_of(filesystem: Any, path: str, most_bytes: int) -> bytes:
    try:
        if filesystem.get_file_info(path).type != fs.FileType.File:  # a device or pipe never ends
            raise _unreadable()
        with filesystem.open_input_stream(path) as file:
            return bytes(file.read(most_bytes + 1))
    except (OSError, ValueError):
        raise _unreadable() from None


def _bytes_within(filesystem: Any, path: str, most_bytes: int, sample: Sample) -> bytes:
    if sample.size == 0:
        return b""
    try:
        with filesystem.open_input_file(path) as file:
            return bytes(file.read_at(min(sample.size, most_bytes + 1), sample.offset))
    except (OSError, ValueError):
        raise _unreadable() from None


def _unreadable() -> ImageError:
    return ImageError(
        "images[0].data",
        "cannot be read: there is no such file, or it may not be read",
        reason="IMAGE_FETCH_FAILED",
    )
