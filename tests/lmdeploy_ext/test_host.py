"""What the extension says about an LMDeploy that it is not for, without importing LMDeploy."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest

from lmdeploy_ext import host
from lmdeploy_ext.patch import ExtensionError, HostDrift


@pytest.fixture
def lmdeploy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A made-up LMDeploy; its modules are what the test puts into it."""
    modules = {
        "lmdeploy.turbomind": SimpleNamespace(is_available=lambda: True, _import_error=None),
        "lmdeploy.turbomind.supported_models": SimpleNamespace(SUPPORTED_ARCHS={}),
    }

    def import_module(name: str) -> Any:
        if name not in modules:
            raise ImportError(f"No module named {name!r}")
        return modules[name]

    monkeypatch.setattr("importlib.import_module", import_module)
    monkeypatch.setattr(host, "version", lambda _: "0.18.0")
    return modules


@pytest.mark.parametrize("version", ["0.18.0", "0.18.7", "0.18.1.post1", "0.18.2+cu128"])
def test_verified_releases(lmdeploy: Any, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(host, "version", lambda _: version)
    host.check()


@pytest.mark.parametrize("version", ["0.17.9", "0.19.0", "0.19.0rc1", "0.19", "1.0", "0.18a"])
def test_other_releases_are_refused(
    lmdeploy: Any, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(host, "version", lambda _: version)
    with pytest.raises(HostDrift, match=f"LMDeploy {version} is not verified") as caught:
        host.check()
    assert "pip install 'lmdeploy>=0.18.0,<0.19'" in str(caught.value)


def test_a_missing_lmdeploy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(host, "version", version)
    with pytest.raises(host.HostUnavailable, match="not installed: pip install"):
        host.check()


@pytest.mark.parametrize("architecture", host.ARCHITECTURES)
def test_a_lmdeploy_with_native_qwen3_vl_is_refused(lmdeploy: Any, architecture: str) -> None:
    supported = lmdeploy["lmdeploy.turbomind.supported_models"].SUPPORTED_ARCHS
    supported[architecture] = "qwen3_vl"
    with pytest.raises(HostDrift, match=f"itself supports {architecture}") as caught:
        host.check()
    assert "no longer needed" in str(caught.value)


def test_a_missing_driver_is_named(lmdeploy: Any) -> None:
    cause = ImportError("libcuda.so.1: cannot open shared object file: No such file or directory")
    lmdeploy["lmdeploy.turbomind"] = SimpleNamespace(
        is_available=lambda: False, _import_error=cause
    )
    with pytest.raises(host.HostUnavailable, match="NVIDIA driver") as caught:
        host.check()
    assert isinstance(caught.value, ExtensionError)


def test_a_missing_library_is_named(lmdeploy: Any) -> None:
    cause = OSError("libnccl.so.2: cannot open shared object file")
    lmdeploy["lmdeploy.turbomind"] = SimpleNamespace(
        is_available=lambda: False, _import_error=cause
    )
    with pytest.raises(host.HostUnavailable, match=r"libnccl\.so\.2.*Reinstall"):
        host.check()


def test_a_broken_import_names_the_cause(lmdeploy: Any) -> None:
    del lmdeploy["lmdeploy.turbomind"]
    with pytest.raises(host.HostUnavailable, match="cannot be imported: No module named"):
        host.check()


def test_a_missing_class_counts_once(lmdeploy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"lmdeploy.turbomind:Gone": "()", "lmdeploy.turbomind:Gone.f": "(self)",
             "lmdeploy.turbomind:is_available": "(x)"}  # fmt: skip
    monkeypatch.setattr(host, "NAMES", names)
    first, second = host.problems()
    assert first.startswith("lmdeploy.turbomind:Gone does not exist")
    assert second == "lmdeploy.turbomind:is_available takes (), not (x)"
