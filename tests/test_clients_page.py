"""docs/clients.md and the page of the light client: their programs run, their tables are complete."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path

import pytest

from qwen3vl import CallError, Client
from tests.service.harness import image_bytes, running

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs/clients.md", ROOT / "clients/python/README.md"]
PROGRAMS = [
    program
    for page in PAGES
    for program in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.splitlines()[-1].strip())
async def test_a_program_of_the_page_runs(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image.png").write_bytes(image_bytes(file_format="PNG"))
    program = program.replace('"examples/', f'"{ROOT}/examples/')
    program = program.replace('"image.png"', repr(str(tmp_path / "image.png")))
    assert "localhost:50051" in program
    async with running() as started:
        code = program.replace("localhost:50051", started.address)
        await asyncio.to_thread(exec, code, {"__name__": "page"})
    assert capsys.readouterr().out.strip()


def test_the_tables_name_every_argument_and_attribute() -> None:
    text = PAGES[0].read_text()
    for kind in (Client, CallError):
        names = set(inspect.signature(kind).parameters) - {"address"}
        assert sorted(name for name in names if f"`{name}" not in text) == []
    defaults = inspect.signature(Client).parameters
    assert f"{defaults['timeout_s'].default:g} by default" in text
    assert f"{defaults['attempts'].default} by default" in text
