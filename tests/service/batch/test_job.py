"""What the driver of a run gives its actors."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the extra batch is not installed")

from service.batch.job import for_actors
from service.batch.places import absolute
from service.engines.remote.options import RemoteSettings
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


def test_paths_of_engines_are_those_of_the_directory_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("key", "ca.pem"):
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    options = {"remote_url": "https://there", "remote_key_file": "key", "remote_ca": "ca.pem"}
    given = load_settings(**UNSERVED, engine="remote", **options)
    sent = for_actors(given).engine_settings
    assert isinstance(sent, RemoteSettings)
    assert (sent.remote_key_file, sent.remote_ca) == (tmp_path / "key", tmp_path / "ca.pem")
    assert sent.remote_file is None
