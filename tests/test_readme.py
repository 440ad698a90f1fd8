"""What the README promises: commands that exist and run, links that lead somewhere, examples that load."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from service.cli.arguments import read_settings
from service.engines.fake import FakeEngine
from service.schema_compiler.analysis import analyse
from service.schema_compiler.formats import FORMATS
from service.schema_compiler.schema import DEFAULT_LIMITS
from service.schema_compiler.string_formats import FORMAT_PATTERNS
from service.tasks.registry import load_registry
from service.types import Grammar, GrammarKind
from tests.service.cli.terminal import Outcome, called, process, qwen3vl, wait_for
from tests.service.harness import running

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    path
    for folder in (".", "docs", "examples", "benchmarks/results", "service/bundled")
    for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
    if "node_modules" not in path.parts
)
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
DEMO = re.compile(r"<!-- demo:begin -->\n(?P<body>.*?)<!-- demo:end -->", re.DOTALL)
SCHEMA = re.compile(r"<!-- schema:begin -->\n(?P<body>.*?)<!-- schema:end -->", re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [found["body"] for found in FENCE.finditer(text) if found["language"] == language]


def commands(text: str) -> list[list[str]]:
    """Words of every ``$ …`` line of the console blocks; comments and line breaks taken out."""
    lines = "\n".join(blocks(text, "console")).replace("\\\n", " ").splitlines()
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


PAGE = SCHEMA.sub("", DEMO.sub("", README))
OURS = [words[1:] for words in commands(PAGE) if words[0] == "qwen3vl"]
CALLS = [words for words in OURS if words[0] not in ("serve", "check", "health")]
SERVERS = [words for words in OURS if words[0] in ("serve", "check")]


def test_the_page_has_commands() -> None:
    assert {words[0] for words in OURS} == {"serve", "check", "health", "analyze", "run", "tasks"}


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
async def test_a_call_of_the_page_runs(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    def call(address: str) -> Outcome:
        return qwen3vl(*words, env={"QWEN3VL_SERVER": address})

    async with running(FakeEngine()) as started:
        done = await asyncio.to_thread(call, started.address)
    assert done.code == 0, done.err
    assert done.out.strip()


@pytest.mark.parametrize("words", SERVERS, ids=" ".join)
def test_settings_of_the_page_are_valid(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    assert read_settings(words[0], words[1:]) is not None


def test_settings_in_the_running_text_are_valid(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    found = [shlex.split(words) for words in re.findall(r"`(qwen3vl [^`]+)`", README)]
    inline = [words for words in found if words[1] in ("serve", "check")]
    assert ["qwen3vl", "serve", "--tasks-dir", "tasks/"] in inline
    for _, command, *words in inline:
        if words == ["--help"]:
            assert qwen3vl(command, "--help").code == 0
        else:
            assert read_settings(command, words) is not None
    for name, value in re.findall(r"`(QWEN3VL_[A-Z_]+)=([^`]+)`", README):
        monkeypatch.setenv(name, value)
        settings = read_settings("serve", [])
        assert str(getattr(settings, name.removeprefix("QWEN3VL_").lower())) == value


@pytest.mark.slow
def test_serve_and_check_and_health_as_on_the_page() -> None:
    environment = {"QWEN3VL_ENGINE": "fake", "QWEN3VL_PORT": "0"}
    assert qwen3vl("check", env=environment).code == 0
    with process("serve", env=environment) as server:
        assert server.stderr is not None
        line = wait_for(server.stderr, "SERVING on port ")[-1]
        address = f"127.0.0.1:{line.split()[3].rstrip('.')}"
        (health,) = [words for words in OURS if words[0] == "health"]
        assert qwen3vl(*health, env={"QWEN3VL_SERVER": address}).out == "SERVING\n"


def test_the_task_file_of_the_page_loads(tmp_path: Path) -> None:
    (example,) = blocks(README, "yaml")
    (tmp_path / "task.yaml").write_text(example)
    task = load_registry(tmp_path).get(yaml.safe_load(example)["name"])
    assert task.grammar is not None


# Is my schema enforced?


def section() -> str:
    found = SCHEMA.search(README)
    assert found is not None
    return found["body"]


async def test_the_reports_on_schemas_are_what_the_page_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    (shown,) = blocks(section(), "console")
    printed, codes = [], []
    async with running() as started:
        for words in commands(section()):
            done = await called(*words[1:], env={"QWEN3VL_SERVER": started.address})
            printed.append(f"$ {shlex.join(words)}\n{done.out}")
            codes.append(done.code)
    assert "\n".join(printed) == shown
    assert codes == [0, 3]


async def test_the_report_in_python_is_what_the_page_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (program,), (shown,) = blocks(section(), "python"), blocks(section(), "")
    assert "localhost:50051" in program
    async with running() as started:
        await asyncio.to_thread(exec, program.replace("localhost:50051", started.address), {})
    assert capsys.readouterr().out == shown


def test_the_formats_are_those_of_the_page() -> None:
    paragraph = README[README.index("`format` asserts") :].partition("\n\n")[0]
    listed, others, kept, partly = re.split(r"(?<=[^.]\.) (?=[A-Z])", " ".join(paragraph.split()))
    names = re.compile(r"`([a-z0-9-]+)`")
    assert set(names.findall(listed)) - {"format"} == FORMATS.keys()
    assert "says nothing" in others
    assert set(names.findall(kept)) == FORMATS.keys() - FORMAT_PATTERNS.keys()
    narrower = {name for name, pattern in FORMAT_PATTERNS.items() if not pattern.exact}
    assert set(names.findall(partly)) == narrower
    for name in ("no-such-format", *FORMATS):
        schema = json.dumps({"type": "string", "format": name})
        found = analyse(Grammar(GrammarKind.JSON_SCHEMA, schema), DEFAULT_LIMITS)
        assert bool(found.report.checked) == (name in names.findall(kept)), name


def test_the_flag_of_another_attempt_is_one_of_the_server() -> None:
    (most,) = re.findall(r"`--output-retries`, up to (\d)", README)
    assert read_settings("serve", ["--output-retries", most]) is not None
    assert read_settings("serve", ["--output-retries", str(int(most) + 1)]) is None


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(phony.split()) == targets
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    ci = (ROOT / ".ci" / "run").read_text()
    for text in (README, contributing, ci):
        used = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
        assert used
        assert used <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    missing = []
    for target in LINK.findall(FENCE.sub("", text)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            missing.append(target)
    assert missing == []


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# The demo


def structure(printed: str) -> list[str]:
    """What stays the same from run to run: commands, names of fields, the shape of the JSON."""
    found = []
    text = re.sub(r"(127\.0\.0\.1:|--port )\d+", r"\1PORT", printed)
    for answer in re.findall(r"^\{.*?^\}$", text, re.MULTILINE | re.DOTALL):
        text = text.replace(answer, f"JSON {sorted(shape(json.loads(answer)))}")
    for line in text.splitlines():
        if line.startswith(("$ ", "JSON ", "Server stopped")):
            found.append(line)
        elif line.startswith("SERVING on "):
            found.append("SERVING")
        elif re.match(r"[a-z_]+: ", line):
            found.append(line.partition(":")[0])
    return found


def shape(value: object, path: str = "") -> set[str]:
    """Paths of all keys; those of the objects in a list as one."""
    if isinstance(value, dict):
        inner = [shape(item, f"{path}.{key}") for key, item in value.items()]
    elif isinstance(value, list):
        inner = [shape(item, f"{path}[]") for item in value]
    else:
        return {path}
    return set().union(*inner) or {path}


def test_the_structure_tells_outputs_apart() -> None:
    printed = '$ qwen3vl serve --port 1\nscene:       desert\n{\n  "a": [{"b": 1}, {"b": 2}]\n}\n'
    assert structure(printed) == [
        "$ qwen3vl serve --port PORT",
        "scene",
        "JSON ['.a[].b']",
    ]


@pytest.mark.slow  # starts a server on the bundled model
def test_the_demo_prints_what_the_page_shows() -> None:
    done = subprocess.run(
        [sys.executable, "examples/demo.py"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("QWEN3VL_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    page = DEMO.search(README)
    assert page is not None
    (block,) = FENCE.findall(page["body"]) or [("", "")]
    assert structure(block[1]) == structure(done.stdout), done.stdout
