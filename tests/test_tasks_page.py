"""docs/tasks.md: its task files load, its commands run, its table names every key."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from service.engines.fake import FakeEngine
from service.tasks.contract import Task
from service.tasks.files import TaskFile
from service.tasks.registry import ENTRY_POINTS, Registry, load_registry
from tests.pages import ROOT, blocks, own_commands
from tests.service.cli.terminal import called
from tests.service.harness import running

ANSWER = '{"total": 12.5, "currency": "EUR"}'
PAGE = (ROOT / "docs/tasks.md").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The task files of the page, and the image of the example."""
    for number, text in enumerate(blocks(PAGE, "yaml")):
        (tmp_path / f"task-{number}.yaml").write_text(text)
    shutil.copy(ROOT / "examples/drawings/samples/day-sea.png", tmp_path / "receipt-1.jpg")
    return tmp_path


def test_the_task_files_load(folder: Path) -> None:
    registry = load_registry(folder)
    for number, text in enumerate(blocks(PAGE, "yaml")):
        task = registry.get(yaml.safe_load(text).get("name", f"task-{number}"))
        assert task.grammar is not None
    assert [len(task.example_images) for task in registry.list()] == [0, 0, 1]


async def test_the_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    listed, run = own_commands(PAGE)
    async with running(FakeEngine(ANSWER), tasks_dir=folder) as started:
        done = [
            await called(*words, env={"QWEN3VL_SERVER": started.address}) for words in (listed, run)
        ]
    assert [one.code for one in done] == [0, 0], done
    assert "receipt-total" in done[0].out
    assert json.loads(done[1].out) == json.loads(ANSWER)


def test_the_table_names_every_key() -> None:
    (table,) = re.findall(r"^\| key \|.*?\n\n", PAGE, re.MULTILINE | re.DOTALL)
    keys = {
        name
        for row in table.strip().splitlines()[2:]
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert keys == TaskFile.model_fields.keys()


def test_the_task_in_python_is_one() -> None:
    (program,), (entry,) = blocks(PAGE, "python"), blocks(PAGE, "toml")
    scope: dict[str, object] = {}
    exec(program, scope)
    task = scope["TASK"]
    assert isinstance(task, Task)
    assert (
        f'[project.entry-points."{ENTRY_POINTS}"]\n{task.name} = "my_package.tasks:TASK"' in entry
    )
    assert Registry([task]).get("day-or-night").needs_image
