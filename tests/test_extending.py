"""docs/extending.md, followed: the code of each section is run as it stands on the page."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PillowImage

from docs.generate import error_table
from lmdeploy_ext import families
from lmdeploy_ext.families import find_family, known_architectures
from service.engines.fake import FakeEngine
from service.error_table import REASONS
from service.errors import OutputInvalid
from service.grpc_api.server import GrpcFrontEnd
from service.runtime import Runtime
from service.schema_compiler.api import analyse
from service.schema_compiler.frontend import formats
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.schema_compiler.lower import format_patterns as string_formats
from service.schema_compiler.report import Enforcement
from service.settings import Settings
from service.structured_output.answers import AnswerValidator
from service.tasks.registry import load_registry
from service.types import Grammar, GrammarKind
from tests.service.harness import failure, inline, run_request, running

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^ *```(?P<language>\w+)\n(?P<body>.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(title: str, language: str = "python") -> list[str]:
    """The code of one section, without the indentation of the list that it stands in."""
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    fences = FENCE.finditer(found[1])
    return [textwrap.dedent(one["body"]) for one in fences if one["language"] == language]


def names(title: str) -> dict[str, Any]:
    """What the code of a section defines."""
    found: dict[str, Any] = {"__name__": "page"}
    for block in blocks(title):
        exec(block, found)
    return found


def test_every_section_has_code() -> None:
    titles = re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)
    assert [title for title in titles if not blocks(title)] == []
    assert len(list(FENCE.finditer(PAGE))) == sum(
        len(blocks(title, language)) for title in titles for language in ("python", "toml")
    )


ENGINE_PROGRAM = """
import asyncio

import parrot
from service.engines import registry

registry.ENGINES[parrot.KIND.name] = parrot.KIND  # the line of the registry

from service.cli.arguments import read_settings
from service.wiring import build_engine
from tests.service.harness import inline, run_request, running


async def main():
    settings = read_settings("serve", {words!r})
    async with running(build_engine(settings)) as started:
        response = await started.stub.RunTask(run_request(inline("Say something.")))
    print(response.result.text)


asyncio.run(main())
"""


@pytest.mark.slow
def test_an_engine(tmp_path: Path) -> None:
    """In a process of its own, since settings take their fields from the registry when they are imported."""
    (module,) = blocks("An engine")
    (tmp_path / "parrot.py").write_text(module)
    (command,) = re.findall(r'`qwen3vl (serve --engine parrot --words "[^`]+")`', PAGE)
    _, *words = re.findall(r'"[^"]*"|\S+', command)
    program = ENGINE_PROGRAM.format(words=[word.strip('"') for word in words])
    paths = [str(tmp_path), str(ROOT), str(ROOT / "clients" / "python")]
    start = f"import sys; sys.path[:0] = {paths!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", start + program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "good morning\n"


def test_a_model_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is found; the page names the test that serves a model of such a family."""
    family = names("A model family")["NEW_VL"]
    assert find_family("NewVLForConditionalGeneration") is None
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, family])
    assert find_family("NewVLForConditionalGeneration") is family
    assert "NewVLForConditionalGeneration" in known_architectures()
    served = ROOT / "tests/service/engines/common/test_families.py"
    assert str(served.relative_to(ROOT)) in PAGE
    assert "async def test_a_new_family_is_one_record" in served.read_text()


async def test_a_front_end() -> None:
    """It answers beside gRPC, and shows the status of an error."""
    runtime = Runtime(Settings(port=0), [FakeEngine("an answer")], load_registry(None))
    line, grpc = names("A front end")["LineFrontEnd"](runtime), GrpcFrontEnd(runtime)

    async def ask(question: str) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        writer.write(question.encode() + b"\n")
        said = await asyncio.wait_for(reader.readline(), 60)
        writer.close()
        return said.decode().strip()

    await runtime.start([grpc, line])
    try:
        assert await ask("What?") == "503 The model is loading. Try again later."
        await runtime.load()
        assert await ask("What?") == "an answer"
        assert (await ask(" ")).startswith("400 task.inline.user: is empty")
    finally:
        await runtime.stop(0)


async def test_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = names("An error")
    row = found["ROW"]
    assert row.name not in REASONS
    assert row.name == found["ImageBlurred"].reason
    monkeypatch.setitem(REASONS, row.name, row)
    assert f"| `{row.name}` | INVALID_ARGUMENT | 400 | no |" in error_table()

    def blurred(request: object) -> str:
        raise found["ImageBlurred"]("images[0].data", "is too blurred")

    async with running() as started:
        started.engine.answer = blurred
        error = await failure(started.stub.RunTask(run_request(inline("Go."))))
    assert (error.code.name, error.reason) == ("INVALID_ARGUMENT", "IMAGE_BLURRED")
    assert "images[0].data: is too blurred" in str(error)


@pytest.fixture
def country_code(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found = names("A string format")
    for name, check in found["CHECK"].items():
        monkeypatch.setitem(formats.FORMATS, name, check)
    return found


def schema(format_name: str, **more: object) -> str:
    return json.dumps({"type": "string", "format": format_name, **more})


def test_a_string_format(country_code: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, pattern in country_code["PATTERN"].items():
        monkeypatch.setitem(string_formats.FORMAT_PATTERNS, name, pattern)
        matches = re.compile(pattern.pattern).search
        for text in ("DE", "FR", "de", "D", "DEU", "D1", ""):
            assert (matches(text) is not None) == country_code["CHECK"][name](text)
    source = schema("country-code", title="with a pattern")
    report = analyse(Grammar(GrammarKind.JSON_SCHEMA, source), DEFAULT_LIMITS).report
    assert report.enforcement is Enforcement.ENFORCED
    validator = AnswerValidator(source, DEFAULT_LIMITS)
    validator.check('"DE"')
    with pytest.raises(OutputInvalid):
        validator.check('"de"')


def test_a_string_format_without_a_pattern_is_checked(country_code: dict[str, Any]) -> None:
    source = schema("country-code", title="without a pattern")
    report = analyse(Grammar(GrammarKind.JSON_SCHEMA, source), DEFAULT_LIMITS).report
    assert [one.pointer for one in report.checked] == ["/format"]


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with the task of the page, as it is when it was installed."""
    (module,) = blocks("A task")
    (table,) = blocks("A task", "toml")
    group, target = re.fullmatch(r'\[project\.entry-points\."([\w.]+)"\]\n(.+)\n', table).groups()  # type: ignore[union-attr]
    (tmp_path / "acme_tasks.py").write_text(module)
    info = tmp_path / "acme_tasks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-tasks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{target.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_tasks", raising=False)


@pytest.mark.usefixtures("acme")
def test_a_task() -> None:
    task = load_registry(None).get("count-shapes")
    assert task.report is not None
    assert task.report.enforcement is Enforcement.ENFORCED
    assert task.parse is not None
    assert task.parse('{"shapes": ["circle", "square"]}') == 2


@pytest.mark.slow
@pytest.mark.usefixtures("acme")
def test_a_task_without_a_server(tmp_path: Path) -> None:
    PillowImage.new("RGB", (96, 64), "white").save(tmp_path / "drawing.png")
    count = names("Run a task without a server")["count"]
    result = asyncio.run(count(tmp_path / "drawing.png"))
    assert set(json.loads(result.text)["shapes"]) <= {"circle", "square"}
    assert result.value == len(json.loads(result.text)["shapes"])
