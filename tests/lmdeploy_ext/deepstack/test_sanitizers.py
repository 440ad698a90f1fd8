"""The hook library under sanitizers of addresses, undefined behaviour and threads; see `stress.c`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lmdeploy_ext.deepstack import library
from tests.lmdeploy_ext.deepstack.test_hook import NAMES

pytestmark = pytest.mark.slow  # compiles

STRESS = Path(__file__).with_name("stress.c")
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
ROUNDS = 3000
REPORTS = ("Sanitizer", "runtime error")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def _compile(compiler: str, folder: Path, kinds: str) -> None:
    """The library, the module and the program, all with the sanitizers in them.

    Skips where the compiler has none, or where what it builds does not run.
    """
    flags = [f"-fsanitize={kinds}", "-fno-sanitize-recover=all", "-g", "-O1", "-w", "-std=gnu11"]
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    empty = [compiler, *flags, str(folder / "empty.c"), "-o", str(folder / "empty")]
    built = subprocess.run(empty, capture_output=True, text=True)
    if built.returncode != 0:
        pytest.skip(f"{compiler} has no -fsanitize={kinds}: {built.stderr.strip()[-200:]}")
    started = subprocess.run([str(folder / "empty")], capture_output=True, text=True)
    if started.returncode != 0:
        pytest.skip(f"-fsanitize={kinds} does not run here: {started.stderr.strip()[-200:]}")
    shared = [compiler, *flags, "-fPIC", "-shared"]
    names = [f"-D{key.upper()}={name}" for key, name in NAMES.items()]
    for command in (
        [*shared, str(library.SOURCE), "-o", str(folder / "hook.so"), "-ldl"],
        [*shared, "-DMODULE", *names, str(STRESS), "-o", str(folder / "module.so")],
        [compiler, *flags, str(STRESS), "-o", str(folder / "stress"), "-ldl", "-lpthread"],
    ):
        subprocess.run(command, check=True)


@pytest.fixture(scope="module", params=SANITIZERS)
def stress(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, compiler: str
) -> Run:
    """Runs the program, perhaps with a fault."""
    folder = tmp_path_factory.mktemp(request.param)
    _compile(compiler, folder, SANITIZERS[request.param])

    def start(rounds: int, *fault: str) -> subprocess.CompletedProcess[str]:
        words = [folder / "stress", folder / "hook.so", folder / "module.so", rounds, *fault]
        return subprocess.run(
            [str(word) for word in words], capture_output=True, text=True, timeout=120,
            env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"},
        )  # fmt: skip

    start.kind = request.param  # type: ignore[attr-defined]
    return start


def test_many_threads_in_the_hook(stress: Run) -> None:
    done = stress(ROUNDS)
    assert not [line for line in done.stderr.splitlines() if any(r in line for r in REPORTS)], (
        done.stderr
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        "enough 1",
        "lost 0 0 0 0",
        "told among others 1",
        "told 1 1 3 3",
    ]


def test_the_sanitizers_notice_a_fault(stress: Run) -> None:
    fault = {"address": "overrun", "thread": "race"}[stress.kind]  # type: ignore[attr-defined]
    done = stress(200, fault)
    assert done.returncode != 0
    assert any(report in done.stderr for report in REPORTS)
