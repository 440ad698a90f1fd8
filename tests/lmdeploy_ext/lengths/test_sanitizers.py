"""The library under sanitizers of addresses, undefined behaviour and threads; see `stress.c`."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest

from lmdeploy_ext.deepstack.library import HEADER, LibraryUnavailable, find_compiler
from lmdeploy_ext.lengths.binding import SOURCE
from tests.lmdeploy_ext.lengths.oracle import string_table
from tests.lmdeploy_ext.lengths.test_native import SCHEMAS, table

pytestmark = pytest.mark.slow  # compiles

STRESS = Path(__file__).with_name("stress.c")


@pytest.mark.parametrize("kinds", ["address,undefined", "thread"])
def test_random_texts_and_threads(kinds: str, tmp_path: Path) -> None:
    try:
        compiler = find_compiler()
    except LibraryUnavailable as error:
        pytest.skip(str(error))
    flags = [f"-fsanitize={kinds}", "-fno-sanitize-recover=all", "-g", "-O1", "-w", "-std=gnu11"]
    program = tmp_path / "stress"
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    for source in (tmp_path / "empty.c", STRESS):
        command = [
            compiler,
            *flags,
            f"-I{SOURCE.parent}",
            f"-I{HEADER.parent}",
            str(source),
            "-o",
            str(program),
            "-ldl",
            "-lpthread",
        ]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode != 0 and source != STRESS:
            pytest.skip(f"{compiler} has no -fsanitize={kinds}: {built.stderr.strip()[-200:]}")
        assert built.returncode == 0, built.stderr
        if source != STRESS and subprocess.run([str(program)], capture_output=True).returncode:
            pytest.skip(f"-fsanitize={kinds} does not run here")
    tables = [table(schema).numbers.tobytes() for schema in SCHEMAS.values()]
    tables += [string_table(0, 2), string_table(3, None)]
    data = b"".join(struct.pack("<i", len(one) // 4) + one for one in tables)
    (tmp_path / "tables").write_bytes(data)
    done = subprocess.run(
        [str(program), str(tmp_path / "tables"), "300"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout == "kept 1 constructed 1 joined 1 broken 0\n"
