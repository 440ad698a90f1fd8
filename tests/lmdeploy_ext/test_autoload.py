"""The import hook on a stand-in for LMDeploy, in this process."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import lmdeploy_ext
from lmdeploy_ext import __main__ as command
from lmdeploy_ext import autoload, deepstack, host, switches
from lmdeploy_ext.patch import ExtensionError
from lmdeploy_ext.promises import PROMISES

HOST = "host_of_the_test"


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What happens, in order: the host's package, its module ``part``, and the installation."""
    happened: list[str] = []
    package = tmp_path / HOST
    package.mkdir()
    for name in ("__init__", "part"):
        code = (
            f"import sys\nsys.events.append({name!r})\nif {name!r} in sys.broken: raise KeyError\n"
        )
        (package / f"{name}.py").write_text(code)
    monkeypatch.setattr(sys, "events", happened, raising=False)
    monkeypatch.setattr(sys, "broken", set(), raising=False)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(autoload, "HOST", HOST)
    monkeypatch.setattr(lmdeploy_ext, "install", lambda: happened.append("install"))
    monkeypatch.delenv(autoload.VARIABLE, raising=False)
    yield happened
    for name in [name for name in sys.modules if name.partition(".")[0] == HOST]:
        del sys.modules[name]


def armed() -> int:
    return sum(isinstance(finder, autoload._Finder) for finder in sys.meta_path)


@pytest.mark.parametrize("value", [None, "", " ", "0", "false", "Off", "no"])
def test_without_the_variable_nothing_is_installed(
    value: str | None, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv(autoload.VARIABLE, value)
    autoload.arm()
    importlib.import_module(HOST)
    assert armed() == 0
    assert events == ["__init__"]


@pytest.mark.parametrize("value", ["1", "true", "ON", " yes "])
def test_the_variable_installs_the_extension(
    value: str, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(autoload.VARIABLE, value)
    autoload.arm()
    autoload.arm()
    assert armed() == 1
    importlib.import_module("json.decoder")
    assert events == []
    importlib.import_module(f"{HOST}.part")
    assert events == ["__init__", "install", "part"]
    assert armed() == 0
    importlib.import_module(HOST)
    assert events == ["__init__", "install", "part"]


def test_the_host_keeps_its_loader(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autoload.VARIABLE, "1")
    autoload.arm()
    host = importlib.import_module(HOST)
    part = importlib.import_module(f"{HOST}.part")
    assert host.__spec__ is not None
    assert type(host.__spec__.loader) is type(host.__loader__) is type(part.__loader__)
    assert host.__spec__.origin == host.__file__


def test_looking_up_lmdeploy_does_not_install_the_extension(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(autoload.VARIABLE, "1")
    autoload.arm()
    spec = importlib.util.find_spec(HOST)
    assert spec is not None
    loader: Any = spec.loader
    assert loader.get_filename(HOST) == spec.origin
    assert loader.is_package(HOST)
    assert events == []


def test_a_removed_finder_is_tolerated(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autoload.VARIABLE, "1")
    autoload.arm()
    monkeypatch.setattr(lmdeploy_ext, "install", lambda: sys.meta_path.pop(0))
    importlib.import_module(HOST)
    assert armed() == 0


def test_an_imported_lmdeploy_gets_the_extension_at_once(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module(HOST)
    monkeypatch.setenv(autoload.VARIABLE, "1")
    autoload.arm()
    assert events == ["__init__", "install"]


def test_a_failed_import_can_be_repeated(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(autoload.VARIABLE, "1")
    autoload.arm()
    monkeypatch.setattr(sys, "broken", {"__init__"})
    with pytest.raises(KeyError):
        importlib.import_module(HOST)
    monkeypatch.setattr(sys, "broken", set())
    importlib.import_module(HOST)
    assert events == ["__init__", "__init__", "install"]


def test_a_missing_lmdeploy_is_an_import_error(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(autoload.VARIABLE, "1")
    monkeypatch.setattr(autoload, "HOST", "no_such_host")
    autoload.arm()
    with pytest.raises(ModuleNotFoundError, match="no_such_host"):
        importlib.import_module("no_such_host")
    assert armed() == 1


def test_other_finders_come_first(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        """Has no ``find_spec``, which Python skips."""

    class Other:
        @staticmethod
        def find_spec(name: str, *_: object) -> object:
            events.append(f"asked for {name}")
            return None

    monkeypatch.setattr(sys, "meta_path", [Old(), Other(), *sys.meta_path])
    monkeypatch.setenv(autoload.VARIABLE, "1")
    autoload.arm()
    importlib.import_module(HOST)
    assert events == [f"asked for {HOST}", "__init__", "install"]


@pytest.mark.parametrize("imported", [False, True])
def test_an_invalid_value_of_the_variable_ends_the_process(
    imported: bool,
    events: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if imported:
        importlib.import_module(HOST)
    events.clear()
    monkeypatch.setenv(autoload.VARIABLE, "maybe")
    use = autoload.arm if imported else partial(importlib.import_module, HOST)
    if not imported:
        autoload.arm()
    with pytest.raises(SystemExit) as ended:
        use()
    assert ended.value.code == 1
    assert events == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Qwen3-VL extension of LMDeploy: LMDEPLOY_QWEN3VL='maybe' ")
    assert all(word in line for word in (*switches.ON, *switches.OFF))


def test_a_refused_installation_ends_the_process(
    events: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise ExtensionError("LMDeploy 9 is not verified")

    monkeypatch.setattr(lmdeploy_ext, "install", refuse)
    monkeypatch.setenv(autoload.VARIABLE, "1")
    autoload.arm()
    for _ in range(2):  # whoever swallows the first exit gets no stock LMDeploy either
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(HOST)
        assert ended.value.code == 1
        assert HOST not in sys.modules
        told = capsys.readouterr()
        assert told.err == "Qwen3-VL extension of LMDeploy: LMDeploy 9 is not verified\n"
        assert told.out == ""


def test_a_failed_installation_ends_the_process(
    events: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lmdeploy_ext, "install", lambda: {}["missing"])
    monkeypatch.setenv(autoload.VARIABLE, "1")
    autoload.arm()
    with pytest.raises(SystemExit):
        importlib.import_module(HOST)
    told = capsys.readouterr().err
    assert "KeyError: 'missing'" in told
    assert told.splitlines()[-1].startswith(
        "Qwen3-VL extension of LMDeploy: the installation failed"
    )


# python -m lmdeploy_ext


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_module_prints_its_help(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(arguments)
    shown = capsys.readouterr().out
    assert "serve api_server" in shown
    assert "--disable-vision" in shown
    assert f"{autoload.VARIABLE}=1 lmdeploy" in shown


def test_workers_without_the_extension_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("site.getsitepackages", lambda: ["/nowhere"])
    monkeypatch.setattr("site.getusersitepackages", lambda: "/nowhere")
    with pytest.raises(SystemExit, match="worker processes would run LMDeploy without"):
        command.main(["serve"])


def test_this_environment_has_the_line() -> None:
    assert command.workers_get_it()


def test_the_pth_line_only_looks_up_the_variable() -> None:
    (line,) = Path(autoload.__file__).with_suffix(".pth").read_text().splitlines()
    look_up, _, rest = line.partition(" and ")
    assert look_up == f'import os; os.environ.get("{autoload.VARIABLE}")'
    assert rest == '__import__("lmdeploy_ext.autoload").autoload.arm()'


def start(value: str | None, *options: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; print(*sys.modules)"
    environment = {"PATH": "/usr/bin"} | ({autoload.VARIABLE: value} if value is not None else {})
    return subprocess.run(
        [sys.executable, *options, "-c", code], env=environment, cwd="/", capture_output=True,
        text=True, check=True,
    )  # fmt: skip


@pytest.mark.slow  # starts Python
def test_a_start_of_python_imports_nothing_of_the_extension() -> None:
    unset = start(None, "-X", "importtime")
    assert "lmdeploy_ext" not in unset.stdout
    assert "lmdeploy_ext" not in unset.stderr
    loaded = set(start("1").stdout.split())
    assert "lmdeploy_ext.autoload" in loaded
    assert loaded.isdisjoint({"lmdeploy", "torch", "numpy", "lmdeploy_ext.patches", "asyncio"})


def test_the_page_documents_the_variable() -> None:
    page = (Path(__file__).parents[2] / "docs" / "lmdeploy.md").read_text()
    assert set(re.findall(r"\bLMDEPLOY_\w+", page)) == {
        autoload.VARIABLE, deepstack.VARIABLE, *(promise.variable for promise in PROMISES),
    }  # fmt: skip
    assert all(f"`{mode.value}`" in page for mode in deepstack.Mode)
    assert f"`{autoload.VARIABLE}` takes {', '.join(f'`{v}`' for v in switches.ON)}, or " in page
    assert all(f"`{value}`" in page for value in switches.OFF)
    assert f"`{command.LINE}`" in page
    shown = ", ".join(promise.on for promise in PROMISES)
    assert f"{shown}; TurboMind serves {', '.join(host.ARCHITECTURES)}\n" in page
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links
    assert all((Path(__file__).parents[2] / "docs" / link).exists() for link in links)
