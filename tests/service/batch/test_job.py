"""What the driver of a run gives its actors."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the extra batch is not installed")

from service.batch.job import for_actors
from service.batch.places import absolute
from service.settings import UNSERVED, load_settings


def test_paths_are_those_of_the_directory_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actors on a cluster have another working directory."""
    (tmp_path / "model").mkdir()
    (tmp_path / "bundled").mkdir()
    (tmp_path / "tasks").mkdir()
    monkeypatch.chdir(tmp_path)
    given = load_settings(**UNSERVED, engine="fake", model="model", tasks_dir="tasks")
    sent = for_actors(given)
    assert (sent.model, sent.tasks_dir) == (str(tmp_path / "model"), tmp_path / "tasks")
    assert sent.engine_settings == given.engine_settings
    for name in ("bundled", "Qwen/Qwen3-VL-8B-Instruct"):
        assert for_actors(load_settings(**UNSERVED, engine="fake", model=name)).model == name
    assert absolute("out") == str(tmp_path / "out")
    assert absolute("s3://bucket/out") == "s3://bucket/out"
