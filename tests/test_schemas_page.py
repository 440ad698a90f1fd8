"""docs/schemas.md: its reports are what the server prints, its formats are those of the service."""

from __future__ import annotations

import asyncio
import json
import re
import shlex

import pytest

from docs.generate import schemas_page
from docs.measured import section as measured_section
from service.cli.arguments import read_settings
from service.schema_compiler.api import analyse
from service.schema_compiler.frontend.formats import FORMATS
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.schema_compiler.lower.format_patterns import FORMAT_PATTERNS
from service.types import Grammar, GrammarKind
from tests.pages import ROOT, blocks, commands, section
from tests.service.cli.terminal import called
from tests.service.harness import running

PAGE = (ROOT / "docs/schemas.md").read_text()


async def test_the_reports_on_schemas_are_what_the_page_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    (shown,) = blocks(section(PAGE, "schema"), "console")
    printed, codes = [], []
    async with running() as started:
        for words in commands(section(PAGE, "schema")):
            done = await called(*words[1:], env={"QWEN3VL_SERVER": started.address})
            printed.append(f"$ {shlex.join(words)}\n{done.out}")
            codes.append(done.code)
    assert "\n".join(printed) == shown
    assert codes == [0, 3]


async def test_the_report_in_python_is_what_the_page_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (program,), (shown,) = (
        blocks(section(PAGE, "schema"), "python"),
        blocks(section(PAGE, "schema"), ""),
    )
    assert "localhost:50051" in program
    async with running() as started:
        await asyncio.to_thread(exec, program.replace("localhost:50051", started.address), {})
    assert capsys.readouterr().out == shown


def test_the_formats_are_those_of_the_page() -> None:
    paragraph = PAGE[PAGE.index("`format` asserts") :].partition("\n\n")[0]
    listed, others, enforced, partly, excluded = re.split(
        r"(?<=[^.]\.) (?=[A-Z])", " ".join(paragraph.split())
    )
    names = re.compile(r"`([a-z0-9-]+)`")
    assert set(names.findall(listed)) - {"format"} == FORMATS.keys()
    assert "has no effect" in others
    assert "enforces all of them" in enforced
    narrower = {name for name, pattern in FORMAT_PATTERNS.items() if pattern.wide}
    assert set(names.findall(partly)) == narrower
    checked = set(names.findall(excluded.partition("; ")[2])) - {"not"}
    schemas = [({"type": "string", "format": name}, False) for name in ("no-such-format", *FORMATS)]
    schemas += [({"type": "string", "not": {"format": name}}, name in checked) for name in FORMATS]
    for schema, kept in schemas:
        found = analyse(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)), DEFAULT_LIMITS)
        assert bool(found.report.checked) == kept, schema


def test_the_flag_of_another_attempt_is_one_of_the_server() -> None:
    (most,) = re.findall(r"`--output-retries`, up to (\d)", PAGE)
    assert read_settings("serve", ["--output-retries", most]) is not None
    assert read_settings("serve", ["--output-retries", str(int(most) + 1)]) is None


def test_the_measurements_are_those_of_the_stored_results() -> None:
    assert schemas_page() == PAGE, "docs/schemas.md is out of date: run `make docs`"


def test_measurements_are_written_as_tables() -> None:
    environment = {
        "date": "2026-12-01T10:00:00",
        "cores": 2,
        "load_average_1_5_15_min": [0.5, 1, 1],
    }
    ours = {"engine": "ours", "schemas": 1089, "exact": 1028, "OK answers invalid": 0, "served": 1085,
            "enforced": 1039, "enforced by the grammar alone": 964}  # fmt: skip
    peer = {
        "engine": "llguidance",
        "schemas": 1089,
        "exact": 916,
        "OK answers invalid": 0,
        "served": 921,
    }
    maskbench = {
        "notes": "llguidance 1, llguidance 1. 1089 schemas",
        "rows": [peer, ours, {"engine": "ours, default limits"}],
        "environment": environment,
    }
    sampled = {"schema": "sample of 119 over bytes, p50", "ours: compile s": 0.005,
               "xgrammar: compile s": 10.0, "ours / xgrammar": 0.0005}  # fmt: skip
    times = {"rows": [{"schema": "string"}, sampled], "environment": environment}
    lines = measured_section(maskbench, times).splitlines()
    assert lines[0] == "Of 1,089 schemas, 2026-12-01 on 2 cores with a load of 0.5; llguidance 1:"
    assert lines[2] == "| schemas with | llguidance | this service, declared order |"
    assert "| exact grammar | 916 | 1,028 |" in lines
    assert "| `ENFORCED`, on an engine that counts no lengths | – | 964 |" in lines
    assert lines[-1] == "| 119 schemas over bytes, p50 | 5 | 10,000 | 0.0005 |"
    assert "processor time" not in measured_section(maskbench, times | {"rows": []})
