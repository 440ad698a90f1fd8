"""docs/command-line.md: its commands exist and run."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.cli.arguments import read_settings
from tests.pages import ROOT, own_commands, standard_input
from tests.service.cli.terminal import called, process, qwen3vl, wait_for
from tests.service.harness import running

PAGE = (ROOT / "docs/command-line.md").read_text()
COMMANDS = own_commands(PAGE)
CALLS = [words for words in COMMANDS if words[0] not in ("serve", "check", "health")]
SERVERS = [words for words in COMMANDS if words[0] in ("serve", "check")]


def test_the_page_has_commands() -> None:
    assert {words[0] for words in COMMANDS} == {
        "serve",
        "check",
        "health",
        "analyze",
        "run",
        "tasks",
    }
    for name in (
        "serve",
        "check",
        "analyze",
        "run",
        "schema",
        "tasks",
        "health",
        "discover",
        "batch",
    ):
        assert f"| `{name}` |" in PAGE


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
async def test_a_call_runs(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words, stdin = standard_input(words)
    async with running() as started:
        done = await called(*words, env={"QWEN3VL_SERVER": started.address}, stdin=stdin)
    assert done.code == 0, done.err
    assert done.out.strip()


@pytest.mark.parametrize("words", SERVERS, ids=" ".join)
def test_settings_are_valid(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_settings(words[0], words[1:]) is not None


@pytest.mark.slow
def test_serve_and_check_and_health() -> None:
    environment = {"QWEN3VL_ENGINE": "fake", "QWEN3VL_PORT": "0"}
    assert qwen3vl("check", env=environment).code == 0
    with process("serve", env=environment) as server:
        assert server.stderr is not None
        line = wait_for(server.stderr, "SERVING on port ")[-1]
        address = f"127.0.0.1:{line.split()[3].rstrip('.')}"
        (health,) = [words for words in COMMANDS if words[0] == "health"]
        assert qwen3vl(*health, env={"QWEN3VL_SERVER": address}).out == "SERVING\n"
