"""``python -m lmdeploy_ext verify`` against the stock wheel, and against what a new release might change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy_ext import verify
from lmdeploy_ext.deepstack import library
from tests.host_runtime.runner import ROOT, environment

MODULE = """
void HELD(void) {} void RENAMED(int added) {} void DIRECT(void) {}
static void inner(void) {}
void caller(void) { HELD(); HELD(); inner(); }
void *address(void) { return (void *)HELD; }
"""


def test_the_library_and_the_script_name_the_same_functions() -> None:
    source = library.SOURCE.read_text()
    assert len(set(verify._HOOKED)) == 4
    assert [name for name in verify._HOOKED if f'"{name}"' not in source] == []
    assert source.count('"_ZN9turbomind') == 4


def test_differences_are_named() -> None:
    old = {"functions": {"f": "one slot", "g": "one slot"}, "fields": {"A": ["x", "y"], "B": ["z"]}}
    new = {
        "functions": {"f": "two slots", "h": "one slot"},
        "fields": {"A": ["x", "w"], "B": ["z"]},
    }
    assert list(verify.differences(old, new)) == [
        "f: two slots; was: one slot",
        "g is gone",
        "h is new: one slot",
        "A: gone: y; new: w",
    ]
    assert list(verify.differences(old, old)) == []


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("flags", [[], ["-Wl,-Bsymbolic"], ["-Wl,-z,relro,-z,now"]])
def test_a_module_is_read_from_its_file(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, renamed = verify._HOOKED[3], verify._HOOKED[3].replace("EPv", "EPvi", 1)
    (tmp_path / "module.c").write_text(MODULE)
    command = [library.find_compiler(), "-shared", "-fPIC", "-O1", "-fno-inline", *flags]
    names = [f"-DHELD={verify._HOOKED[0]}", f"-DRENAMED={renamed}"]
    out = tmp_path / "module.so"
    subprocess.run([*command, *names, str(tmp_path / "module.c"), "-o", str(out)], check=True)
    found = verify.Symbols(out).hooked()
    direct = "-Wl,-Bsymbolic" in flags
    if not direct:  # the calls go through one slot, the address is kept in another or in the same
        assert found[verify._HOOKED[0]].startswith("exported, called through ")
    assert found[wanted] == f"does not exist; there is {renamed}"
    assert found["calls among exported functions"] == ("bound at link time" if direct else "lazy")
    sealed = "-Wl,-z,relro,-z,now" in flags
    assert (found["table of calls"] == "read-only once loaded") >= sealed


def test_a_file_that_is_no_elf_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no module at all")
    with pytest.raises(ValueError, match=r"text\.so is no ELF file"):
        verify.Symbols(tmp_path / "text.so")


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--all"]) == 2
    assert "there is no option --all" in capsys.readouterr().err


# ---- the stock wheel -------------------------------------------------------------------------------

CHANGED = """
import lmdeploy.messages, lmdeploy.turbomind.models.qwen3 as qwen3
from lmdeploy_ext import verify
del qwen3.Qwen3TextModel.moe
class Outcome(__import__("enum").Enum):
    SUCCESS = 0
lmdeploy.messages.ResponseType = Outcome
raise SystemExit(verify.main([]))
"""


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env=environment("driver"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.host
def test_the_stock_wheel_is_the_verified_one() -> None:
    done = ask("-m", "lmdeploy_ext", "verify")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(verify.VERIFIED.read_text())
    release = content.pop("lmdeploy")
    size = sum(len(part) for part in content.values())
    assert size > 80
    assert (
        done.stdout == f"LMDeploy {release} against {release}: {size} things compared, 0 differ\n"
    )
    assert set(list(content["functions"].values())[:4]) == {"exported, called through 1 slot"}


@pytest.mark.slow
@pytest.mark.host
def test_changes_are_printed() -> None:
    done = ask("-c", CHANGED)
    assert done.returncode == 1, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.endswith("2 differ")
    method = "  lmdeploy.turbomind.models.qwen3:Qwen3TextModel.moe"
    assert lines[0].startswith(
        f"{method}: lmdeploy.turbomind.models.qwen3:Qwen3TextModel.moe does not"
    )
    assert lines[1].startswith("  lmdeploy.messages:ResponseType: gone: ")
    assert "FINISH" in lines[1]


@pytest.mark.slow
@pytest.mark.host
def test_without_a_driver_it_says_what_is_missing() -> None:
    variables = {k: v for k, v in environment("driver").items() if k != "LD_LIBRARY_PATH"}
    command = [sys.executable, "-m", "lmdeploy_ext", "verify"]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        pytest.skip("there is a driver")
    assert "libcuda.so.1 belongs to the NVIDIA driver" in done.stderr
    assert "Traceback" not in done.stderr
