"""A pytest plugin that tells coverage which test runs, and notes which tests start processes.

A context is a test without its parameters, ``tests/service/test_codec.py::test_a``. What a fixture of
a wider scope does is done for a test file, ``tests/service/test_codec.py``, or for a folder. What
runs at import has no context.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from coverage import Coverage

STARTS = "MUTANTS_STARTS_PROCESSES"
"""Variable with the path of the file that takes the contexts in which a process was started."""

_contexts = [""]
_starting: set[str] = set()


def _enter(context: str) -> None:
    _contexts.append(context)
    _switch()


def _leave() -> None:
    _contexts.pop()
    _switch()


def _switch() -> None:
    coverage = Coverage.current()
    assert coverage is not None
    coverage.switch_context(_contexts[-1])


def _watch(event: str, _: object) -> None:
    if event in ("subprocess.Popen", "os.posix_spawn", "os.fork"):
        _starting.add(_contexts[-1])


def pytest_configure() -> None:
    sys.addaudithook(_watch)


def test_of(nodeid: str) -> str:
    return nodeid.partition("[")[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _enter(test_of(item.nodeid))
    try:
        return (yield)
    finally:
        _leave()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Iterator[None]:
    if fixturedef.scope == "function":
        return (yield)
    wide = fixturedef.scope in ("session", "package")
    _enter(fixturedef.baseid if wide else request.node.nodeid.partition("::")[0])
    try:
        return (yield)
    finally:
        _leave()


def pytest_sessionfinish() -> None:
    Path(os.environ[STARTS]).write_text(json.dumps(sorted(_starting)))
