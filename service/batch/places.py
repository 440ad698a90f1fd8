"""Files and folders of a run: paths of this machine, or URIs such as ``s3://bucket/folder``."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

from pyarrow import fs

from service.batch.errors import BatchError

URI = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def opened(place: str) -> tuple[Any, str]:
    """The file system of a path or URI, and the path in it."""
    if not URI.match(place):
        return _local(), os.path.abspath(place)
    scheme, rest = place.split("://", 1)
    host, slash, _ = rest.partition("/")
    try:
        filesystem = _remote(f"{scheme}://{host}")
        path = (
            fs.FileSystem.from_uri(place)[1]
            if scheme == "file"
            else host + slash + rest[len(host) + 1 :]
        )
    except (OSError, ValueError, NotImplementedError) as error:
        raise BatchError(f"{place} cannot be opened: {error}") from None
    return filesystem, path.rstrip("/")


def absolute(place: str) -> str:
    """The place as other processes find it, whose working directory is another one."""
    return place if URI.match(place) else os.path.abspath(place)


def is_local(place: str) -> bool:
    """Whether a place is a path of this machine, also one that is written as ``file://…``."""
    return isinstance(opened(place)[0], fs.LocalFileSystem)


def files_below(place: str) -> tuple[str, list[Any]]:
    """The folder of a place and information on the files in it, sorted by path. A file is a folder
    with this file alone. Hidden files, and those whose name begins with ``_``, are left out."""
    filesystem, path = opened(place)
    try:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise BatchError(f"there is no file or folder {place}")
        if info.type != fs.FileType.Directory:
            return path.rpartition("/")[0], [info]
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    except OSError as error:
        raise BatchError(f"{place} cannot be read: {error}") from None
    try:
        files = [one for one in found if one.type == fs.FileType.File]
        shown = [one for one in files if not _hidden(one.path[len(path) + 1 :])]
    except UnicodeDecodeError as error:
        raise BatchError(f"{place} has a file whose name is not UTF-8: {error}") from None
    return path, sorted(shown, key=lambda one: one.path)


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


@lru_cache
def _local() -> Any:
    return fs.LocalFileSystem()


@lru_cache
def _remote(uri: str) -> Any:
    if uri == "file://":
        return _local()
    return fs.FileSystem.from_uri(uri + "/")[0]
