"""The input of a batch: how it is listed, cut and read."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

pa = pytest.importorskip("pyarrow", reason="the extra batch is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="the extra batch is not installed")

from service.batch.errors import BatchError  # noqa: E402
from service.batch.sources import InputOptions, Source, list_input  # noqa: E402
from service.errors import ImageError  # noqa: E402
from tests.service.batch.inputs import write_parquet, write_tar  # noqa: E402

MOST = 1000


def listed(path: Path, rows: int = 3, **options: Any) -> Source:
    return list_input(InputOptions(str(path), **options), rows)


def rows_of(source: Source) -> list[tuple[dict[str, Any], list[bytes]]]:
    """Every row: its keys and the bytes of its images. The pieces go through pickle, as on Ray."""
    found = []
    for piece in pickle.loads(pickle.dumps(source.pieces)):
        before = len(found)
        for rows in piece.read(MOST):
            assert rows.keys.schema.remove_metadata() == source.key_schema
            for keys, loads in zip(rows.keys.to_pylist(), rows.images, strict=True):
                found.append((keys, [load() for load in loads]))
        assert len(found) - before == piece.rows
    return found


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 100])
@pytest.mark.parametrize("group", [1, 4, 50])
def test_parquet_is_cut_across_its_row_groups(tmp_path: Path, rows: int, group: int) -> None:
    images = [b"%d" % number for number in range(40)]
    write_parquet(tmp_path / "b.parquet", images[:21], group)
    write_parquet(tmp_path / "a.parquet", images[21:], group)
    found = rows_of(listed(tmp_path, rows))
    assert [loaded for _, (loaded,) in found] == images[21:] + images[:21]
    assert [keys for keys, _ in found] == [{"id": n} for n in (*range(19), *range(21))]


def test_images_of_hugging_face_are_structs(tmp_path: Path) -> None:
    images = [{"bytes": b"x\0\0", "path": "x.png"}, None, {"bytes": None, "path": None}]
    pq.write_table(pa.table({"image": images, "text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    found = rows_of(listed(tmp_path / "a.parquet"))
    expected = [({"text": "a"}, [b"x\0\0"]), ({"text": "b"}, [b""]), ({"text": "c"}, [b""])]
    assert found == expected


def test_a_row_may_have_several_images(tmp_path: Path) -> None:
    table = pa.table({"frames": pa.array([[b"1", b"2"], [b"3"], None], pa.list_(pa.binary()))})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [images for _, images in rows_of(listed(tmp_path))] == [[b"1", b"2"], [b"3"], []]


def test_paths_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"near")
    (tmp_path / "b.jpg").write_bytes(b"far")
    paths = ["a.jpg", str(tmp_path / "b.jpg"), (tmp_path / "b.jpg").as_uri(), None]
    pq.write_table(pa.table({"file": paths, "n": range(4)}), tmp_path / "in" / "x.parquet")
    found = rows_of(listed(tmp_path / "in", path_column="file"))
    assert [images for _, images in found] == [[b"near"], [b"far"], [b"far"], [b""]]
    assert found[0][0] == {"file": "a.jpg", "n": 0}
    (tmp_path / "a.jpg").write_bytes(b"other")
    rooted = rows_of(listed(tmp_path / "in", path_column="file", root=str(tmp_path)))
    assert rooted[0][1] == [b"other"]


@pytest.mark.parametrize("name", ["missing.jpg", "folder", "pipe", "nothing://x/y.jpg", "a\0b"])
def test_a_path_that_cannot_be_read_is_an_error_of_its_row(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    pq.write_table(pa.table({"file": [name]}), tmp_path / "x.parquet")
    with pytest.raises(ImageError) as caught:
        rows_of(listed(tmp_path / "x.parquet", path_column="file"))
    assert caught.value.reason == "IMAGE_FETCH_FAILED"
    assert name not in caught.value.message


def test_of_a_large_file_one_byte_more_than_allowed_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(bytes(5000))
    write_tar(tmp_path / "t.tar", {"a.jpg": bytes(5000)})
    for kind in ("images", "tars"):
        ((_, (data,)),) = rows_of(listed(tmp_path, kind=kind))
        assert len(data) == MOST + 1


def test_keys_that_are_kept(tmp_path: Path) -> None:
    table = pa.table({"id": [1], "image": [b"x"], "url": ["u"], "big": ["…"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert listed(tmp_path).key_schema.names == ["id", "url", "big"]
    found = rows_of(listed(tmp_path, keep=("url", "id")))
    assert found == [({"url": "u", "id": 1}, [b"x"])]


def test_a_folder_of_images(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a.jpeg", "b/10.webp", "notes.txt", ".hidden.png", "_tmp/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    source = listed(tmp_path, 2)
    found = [(keys["path"], images) for keys, images in rows_of(source)]
    assert found == [(name, [name.encode()]) for name in ("a.jpeg", "b/10.webp", "b/2.PNG")]
    assert (source.skipped, [piece.rows for piece in source.pieces]) == (1, [2, 1])


def test_web_dataset_tars(tmp_path: Path) -> None:
    files = {
        "0.jpg": b"0",
        "0.json": b"{}",
        "x/1.txt": b"t",
        "x/1.image.png": b"1",
        "2.json": b"{}",
    }
    write_tar(tmp_path / "a.tar", files)
    write_tar(tmp_path / "b.tar", {"0.webp": b"b"})
    found = [(keys["tar"], keys["key"], images) for keys, images in rows_of(listed(tmp_path, 2))]
    assert found == [
        ("a.tar", "0", [b"0"]),
        ("a.tar", "x/1", [b"1"]),
        ("a.tar", "2", [b""]),
        ("b.tar", "0", [b"b"]),
    ]


def _broken_tar(folder: Path) -> None:
    (folder / "a.tar").write_bytes(b"no tar at all")


def _mixed(folder: Path) -> None:
    (folder / "a.jpg").touch()
    write_parquet(folder / "a.parquet", [b"x"])


def _two_images(folder: Path) -> None:
    pq.write_table(pa.table({"a": [b"x"], "b": [b"x"]}), folder / "a.parquet")


def _two_schemas(folder: Path) -> None:
    pq.write_table(pa.table({"a": [b"x"], "id": [1]}), folder / "a.parquet")
    pq.write_table(pa.table({"a": [b"x"], "id": ["1"]}), folder / "b.parquet")


def _text_column(folder: Path) -> None:
    pq.write_table(pa.table({"a": [b"x"], "n": [1]}), folder / "a.parquet")


BAD = [
    (lambda folder: None, {}, "no Parquet files"),
    (_broken_tar, {}, "a.tar is not a complete tar file"),
    (lambda folder: (folder / "a.parquet").write_bytes(b"x"), {}, "not a Parquet file"),
    (lambda folder: (folder / "a.tgz").touch(), {}, "unpack them"),
    (_mixed, {}, "choose with --input-kind"),
    (_two_images, {}, "--image-column"),
    (_two_schemas, {}, "b.parquet has other columns"),
    (_text_column, {"image_column": "n"}, "has int64, not bytes"),
    (_text_column, {"path_column": "n"}, "not paths as text"),
    (_text_column, {"image_column": "c"}, "no column c; there are a, n"),
    (_text_column, {"keep": ("c",)}, "no column c"),
    (_text_column, {"keep": ("a",)}, "is not kept"),
    (_text_column, {"image_column": "a", "path_column": "n"}, "not both"),
    (lambda folder: (folder / "a.jpg").touch(), {"keep": ("a",)}, "options of Parquet"),
    (lambda folder: write_parquet(folder / "a.parquet", []), {}, "has no rows"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "options", "text"), BAD, ids=[text for _, _, text in BAD])
def test_an_input_that_cannot_be_used(
    tmp_path: Path, write: Any, options: dict[str, Any], text: str
) -> None:
    write(tmp_path)
    with pytest.raises(BatchError, match=text):
        listed(tmp_path, **options)


def test_an_input_that_is_not_there(tmp_path: Path) -> None:
    for place in (str(tmp_path / "x"), "nothing://x/y"):
        with pytest.raises(BatchError):
            list_input(InputOptions(place), 3)


def test_pieces_are_read_in_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes of a cluster have their own."""
    for name in ("images", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"1")
    write_tar(tmp_path / "a.tar", {"a.png": b"2"})
    pq.write_table(pa.table({"image": [b"3"]}), tmp_path / "bytes.parquet")
    pq.write_table(pa.table({"path": ["a.png"]}), tmp_path / "paths.parquet")
    monkeypatch.chdir(tmp_path)
    sources = [
        listed(Path("images")),
        listed(Path("a.tar")),
        listed(Path("bytes.parquet")),
        listed(Path("paths.parquet"), path_column="path", root="images"),
    ]
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [rows_of(one)[0][1] for one in sources] == [[b"1"], [b"2"], [b"3"], [b"1"]]
