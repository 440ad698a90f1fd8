"""auto, require and off on the real LMDeploy module, which loads on a driver without a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmdeploy_ext.deepstack.library import LibraryUnavailable, find_compiler
from lmdeploy_ext.deepstack.state import Mode
from lmdeploy_ext.lengths import modes
from tests.host_runtime.runner import run

CONSTRUCTOR = (
    "_ZN8xgrammar14GrammarMatcherC1ERKNS_15CompiledGrammarESt8optionalISt6vectorIiSaIiEEEbi"
)


def test_off_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lmdeploy_ext"):
        assert modes.enter(Mode.OFF) is None
    (record,) = caplog.records
    assert (
        record.getMessage()
        == f"TurboMind does not count lengths of strings, as asked for: {modes.INSTEAD}."
    )


def _enter(folder: str, what: str) -> dict[str, Any]:
    """What each mode says if something is wrong."""
    import logging
    import os

    import lmdeploy.turbomind

    from lmdeploy_ext import host
    from lmdeploy_ext.deepstack import library
    from lmdeploy_ext.lengths import binding, modes

    module = lmdeploy.turbomind._tm.__file__
    if what == "taken over":
        other = Path(folder) / "other.so"
        library.build(other, binding.SOURCE)
        assert binding.Library(other).attach(module) is None
    elif what == "renamed":  # a function with one parameter more, which is another symbol
        source = Path(folder) / "lengths.c"
        source.write_text(binding.SOURCE.read_text().replace("AcceptTokenEib", "AcceptTokenEibi"))
        binding.SOURCE = source
    elif what == "no compiler":
        os.environ["CC"] = "no-such-compiler"
        os.environ["XDG_CACHE_HOME"] = folder
    elif what == "another version":
        host.installed_version = lambda: "0.19.1"
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lmdeploy_ext").addHandler(handler)
    found = modes.enter(Mode.AUTO)
    error = ""
    try:
        modes.enter(Mode.REQUIRE)
    except modes.LengthsUnavailable as raised:
        error = str(raised)
    bound = 0 if found is None else found.bound()
    texts = [
        text.replace(module, "MODULE").replace(folder, "FOLDER") for text in (*warnings, error)
    ]
    return {"texts": texts, "bound": bound}


@pytest.fixture(autouse=True)
def _compiler() -> None:
    try:
        find_compiler()
    except LibraryUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.host
def test_the_stock_module_is_hooked(tmp_path: Path) -> None:
    found = run(_enter, tmp_path, "", mode="driver")
    assert found == {"texts": [""], "bound": 3}


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("renamed", "LMDeploy's module MODULE does not fit: it has no function "
                    "_ZN8xgrammar14GrammarMatcher11AcceptTokenEibi"),
        ("taken over", f"LMDeploy's module MODULE does not fit: {CONSTRUCTOR} is already taken over by "
                       "FOLDER/other.so"),
        ("no compiler", "there is no hook library: the package has no library for x86_64 and there is no "
                        "C compiler to build one (CC=no-such-compiler, which does not exist). "),
        ("another version", "LMDeploy 0.19.1 is not verified"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_once(what: str, problem: str, tmp_path: Path) -> None:
    found = run(_enter, tmp_path, what, mode="driver", extra={"XDG_CACHE_HOME": str(tmp_path)})
    assert found["bound"] == 0
    warning, error = found["texts"]
    begin = f"TurboMind cannot be given limits of lengths: {problem}"
    assert warning.startswith(begin)
    assert warning.endswith(f". So {modes.INSTEAD}.")
    assert error.startswith(begin)
    assert error.endswith(f". With auto, {modes.INSTEAD}.")
