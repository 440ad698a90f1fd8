"""The README is short, its commands and its program run, its links lead somewhere; so do those of all pages."""

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

from service.cli.arguments import read_settings
from tests.pages import FENCE, ROOT, blocks, own_commands, section, without
from tests.service.cli.terminal import process, qwen3vl, wait_for
from tests.service.harness import running

README = (ROOT / "README.md").read_text()
PAGES = sorted(
    path
    for folder in (
        ".",
        "docs",
        "examples",
        "benchmarks/results",
        "clients",
        "service/bundled",
        "tests/host_runtime",
    )
    for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
    if "node_modules" not in path.parts
)
WITH_SETTINGS = ("README.md", "docs/command-line.md", "docs/tasks.md", "docs/operations.md")
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 800


def test_every_page_is_in_the_index() -> None:
    index = {found["target"] for found in LINK.finditer((ROOT / "docs/README.md").read_text())}
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages - index == set()


def test_the_commands_of_the_readme() -> None:
    found = own_commands(without(README, "demo"))
    assert found == [["serve"]]
    assert read_settings("serve", []) is not None


@pytest.mark.parametrize("page", WITH_SETTINGS)
def test_settings_in_the_running_text_are_valid(
    page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    text = FENCE.sub("", (ROOT / page).read_text())
    found = [shlex.split(words) for words in re.findall(r"`(qwen3vl [^`]+)`", text)]
    for command, *words in [words[1:] for words in found if words[1] in ("serve", "check")]:
        if words == ["--help"]:
            assert qwen3vl(command, "--help").code == 0
        elif words:
            assert read_settings(command, words) is not None
    for name, value in re.findall(r"`(QWEN3VL_[A-Z_]+)=([^`]+)`", text):
        monkeypatch.setenv(name, value)
        settings = read_settings("serve", [])
        assert str(getattr(settings, name.removeprefix("QWEN3VL_").lower())) == value


def test_every_setting_in_the_running_text_exists() -> None:
    known = set(re.findall(r"--[a-z][a-z0-9-]+", qwen3vl("serve", "--help").out))
    for page in ("docs/operations.md", "docs/images.md"):
        text = (ROOT / page).read_text()
        used = set(re.findall(r"`(--[a-z][a-z0-9-]+)", text)) - {
            "--server",
            "--restart",
            "--ulimit",
        }
        assert used - known == set(), page


async def test_the_call_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (program,) = blocks(section(README, "call"), "python")
    async with running() as started:
        code = program.replace("localhost:50051", started.address)
        await asyncio.to_thread(exec, code, {})
    assert set(json.loads(capsys.readouterr().out)) == {"objects"}


@pytest.mark.slow  # starts a server on the bundled model
def test_the_call_prints_what_the_readme_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (program,), (shown,) = (blocks(section(README, "call"), kind) for kind in ("python", ""))
    assert "localhost:50051" in program
    with process("serve", env={"QWEN3VL_PORT": "0"}) as server:
        assert server.stderr is not None
        line = wait_for(server.stderr, "SERVING on port ")[-1]
        port = line.split()[3].rstrip(".")
        exec(program.replace("localhost:50051", f"127.0.0.1:{port}"), {})
    assert capsys.readouterr().out == shown


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
def test_links_have_targets(page: Path) -> None:
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
    text = re.sub(r"(127\.0\.0\.1:|port )\d+", r"\1PORT", printed)
    for answer in re.findall(r"^\{.*?^\}$", text, re.MULTILINE | re.DOTALL):
        text = text.replace(answer, f"JSON {sorted(shape(json.loads(answer)))}")
    for line in text.splitlines():
        if line.startswith(("$ ", "JSON ", "Server stopped", "Playground: ")):
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


def test_readme_blocks_are_commands_or_outputs() -> None:
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
    (shown,) = blocks(section(README, "demo"), "console")
    assert structure(shown) == structure(done.stdout), done.stdout
    http = re.search(
        r"^POST http://127\.0\.0\.1:\d+/v1/chat/completions\n  (.*)$", done.stdout, re.M
    )
    assert http is not None, done.stdout
    assert {one["shape"] for one in json.loads(http[1])["objects"]} == {"star", "cross", "triangle"}
