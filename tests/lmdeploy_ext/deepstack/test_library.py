"""Finding and building the hook library."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lmdeploy_ext.deepstack import library


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qwen3vl-lmdeploy-ext"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's folder, so that it can hold a library."""
    folder = tmp_path / "package"
    folder.mkdir()
    source = Path(shutil.copy(library.SOURCE, folder))
    monkeypatch.setattr(library, "HERE", folder)
    monkeypatch.setattr(library, "SOURCE", source)
    return folder


@pytest.mark.slow  # compiles
@pytest.mark.usefixtures("compiler")
def test_the_library_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.find()
    assert found == cache / library.file_name()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert library.find() == found
    assert sorted(cache.iterdir()) == [found], "nothing half-built is left"


def test_another_source_is_another_library(package: Path) -> None:
    before = library.file_name()
    library.SOURCE.write_text(library.SOURCE.read_text() + "\n")
    assert library.file_name() != before


def test_the_wheels_own_library_comes_first(
    package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    (package / library.file_name()).touch()
    assert library.find() == package / library.file_name()


def test_a_missing_compiler_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(library.LibraryUnavailable, match=r"CC=no-such-compiler.*Install one"):
        library.find()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(
        library.LibraryUnavailable, match=r"no cc, gcc or clang.*QWEN3VL_BUILD_HOOK"
    ):
        library.find()


@pytest.mark.usefixtures("compiler")
def test_a_failing_compiler_is_an_error(cache: Path, package: Path) -> None:
    library.SOURCE.write_text("no C at all")
    with pytest.raises(library.LibraryUnavailable, match=r"failed: .*error"):
        library.find()
    assert list(cache.iterdir()) == []


def test_a_folder_that_others_can_write_to_is_not_trusted(cache: Path) -> None:
    assert library.cache_folder() == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    assert library.cache_folder() is None


@pytest.mark.slow  # compiles
@pytest.mark.usefixtures("compiler")
def test_without_a_cache_it_is_built_for_the_process(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    found = library.find()
    assert found.is_file()
    assert found.parent != cache
    assert found.parent.stat().st_mode & 0o777 == 0o700
    assert found.parent.stat().st_uid == os.getuid()


def test_systems_other_than_linux_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.sys, "platform", "darwin")
    with pytest.raises(library.LibraryUnavailable, match="needs Linux"):
        library.find()
