"""Models by their name on the hub: the log says which commit was taken."""

from __future__ import annotations

import http.server
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.engines.common.config import resolve_model
from service.errors import EngineUnavailable

NAME = "somebody/a-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
LOGGER = "service.engines.common.config"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def keep(cache: Path, commit: str, branch: str) -> Path:
    """A snapshot as an earlier download left it."""
    model = cache / "models--somebody--a-model"
    snapshot = model / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / branch).write_text(commit)
    return snapshot


@pytest.mark.parametrize(
    ("revision", "line"),
    [
        (None, f"model {NAME} revision=main commit={COMMIT}"),
        ("v2", f"model {NAME} revision=v2 commit={OTHER}"),
        (OTHER, f"model {NAME} revision={OTHER} commit={OTHER}"),
    ],
)
def test_the_commit_of_the_local_cache_is_logged(
    revision: str | None,
    line: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshots = {COMMIT: keep(cache, COMMIT, "main"), OTHER: keep(cache, OTHER, "v2")}
    folder = resolve_model(NAME, revision)
    assert folder == snapshots[COMMIT if revision is None else OTHER]
    assert line in caplog.messages


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as the download of one file needs."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path.startswith(f"/api/models/{NAME}/tree/"):
            file = {"type": "file", "path": "config.json", "size": 2, "oid": "one"}
            body = json.dumps([file]).encode()
        elif self.path.startswith(f"/api/models/{NAME}/"):
            files = [{"rfilename": "config.json", "size": 2}]
            body = json.dumps({"id": NAME, "sha": COMMIT, "siblings": files}).encode()
        elif self.path == f"/{NAME}/resolve/{COMMIT}/config.json":
            body = b"{}"
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"one"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield address
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("hub")
def test_the_commit_of_a_download_is_logged(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    folder = resolve_model(NAME)
    assert folder == cache / "models--somebody--a-model" / "snapshots" / COMMIT
    assert (folder / "config.json").read_text() == "{}"
    assert f"model {NAME} revision=main commit={COMMIT}" in caplog.messages


def test_a_local_folder_has_no_commit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(tmp_path) == tmp_path
    assert caplog.messages == []


@pytest.mark.usefixtures("cache")
def test_a_model_neither_local_nor_on_the_hub_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EngineUnavailable, match="at revision main"):
        resolve_model(NAME)
