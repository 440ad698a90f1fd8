"""Refusals as a client sees them: the real `lmdeploy serve api_server`, a scripted engine behind it."""

from __future__ import annotations

import http.client
import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.host_runtime.checkpoints import write_text_checkpoint
from tests.host_runtime.server import Server, serve
from tests.lmdeploy_ext.vision_off import calls
from tests.qwen3_5 import write_config

pytestmark = [pytest.mark.slow, pytest.mark.host]  # starts `lmdeploy serve api_server`

COMMAND = (sys.executable, "-m", "tests.lmdeploy_ext.vision_off.scripted")
OPTIONS = ("--model-name", calls.MODEL, "--disable-metrics")


@dataclass(frozen=True)
class Scripted:
    """A server that answers, and the log of what reached its engine."""

    server: Server
    log: Path

    def post(self, request: calls.Request) -> tuple[int, str]:
        return calls.post(self.server, request)

    def reached_engine(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


def start(
    stack: ExitStack, folder: Path, checkpoint: Path, *options: str, **variables: str
) -> Scripted:
    folder.mkdir()
    log = folder / "engine.log"
    serving = serve(
        checkpoint, folder, *OPTIONS, *options, command=COMMAND, mode="driver",
        extra={"SCRIPTED_LOG": str(log), **variables},
    )  # fmt: skip
    return Scripted(stack.enter_context(serving), log)


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    folder = tmp_path_factory.mktemp("refusing")
    checkpoint = write_checkpoint(folder / "checkpoint")
    with ExitStack() as stack:
        options = ("--disable-vision", "--api-keys", calls.KEY)
        yield start(stack, folder / "server", checkpoint, *options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scripted, Scripted]]:
    """A text model with vision not disabled: with the extension, and stock."""
    folder = tmp_path_factory.mktemp("pair")
    checkpoint = write_text_checkpoint(folder / "checkpoint")
    with ExitStack() as stack:
        extended = start(stack, folder / "extended", checkpoint)
        yield extended, start(stack, folder / "stock", checkpoint, SCRIPTED_STOCK="1")


def message(path: str, text: str) -> str:
    """The message of an error body, after a look at the shape that the route's API gives it."""
    body = json.loads(text)
    if path.startswith("/v1/messages"):
        assert body.keys() == {"type", "error"}
        assert body["type"] == "error"
        assert body["error"].keys() == {"type", "message"}
        error = body["error"]
    elif path == "/v1/responses":
        assert body.keys() == {"error"}
        error = body["error"]
        assert error["code"] == 400
    else:
        error = body
        assert body.keys() == {"message", "type", "code", "param", "object"}
        assert (body["code"], body["object"]) == (400, "error")
    assert error["type"] == "invalid_request_error"
    return str(error["message"])


REFUSED = dict([*calls.every_part(), *calls.every_place()])


@pytest.mark.parametrize("request_", REFUSED.values(), ids=REFUSED)
def test_whatever_is_not_text_is_refused(refusing: Scripted, request_: calls.Request) -> None:
    before = refusing.reached_engine()
    status, text = refusing.post(request_)
    assert status == 400, text
    said = message(request_[0], text)
    assert said.startswith("VISION_DISABLED: ")
    assert "--disable-vision" in said
    assert calls.PIXEL not in said
    assert refusing.reached_engine() == before


ANSWERED = dict(calls.text_only())


@pytest.mark.parametrize(("name", "request_"), ANSWERED.items(), ids=ANSWERED)
def test_text_is_answered(refusing: Scripted, name: str, request_: calls.Request) -> None:
    before = refusing.reached_engine()
    status, text = refusing.post(request_)
    assert status == 200, text
    assert text.startswith(("data: ", "event: ")) == ("stream" in name)
    if name != "count_tokens":
        assert refusing.reached_engine() > before


@pytest.mark.parametrize(
    ("moe", "option"), [(False, "--disable-vision"), (True, "--disable-vision-encoder")]
)
def test_qwen3_5_refuses_images_too(tmp_path: Path, moe: bool, option: str) -> None:
    """Its vision model is LMDeploy's own, under other names of architectures."""
    write_config(tmp_path / "checkpoint", moe=moe)
    with ExitStack() as stack:
        server = start(stack, tmp_path / "server", tmp_path / "checkpoint", option)
        for part, expected in ((calls.PARTS["image"], 400), (None, 200)):
            status, text = server.post(calls.chat(part) if part else calls.chat())
            assert (status, "VISION_DISABLED: " in text) == (expected, expected == 400), text
        assert server.reached_engine() == 1


def test_chunked_bodies_and_bodies_that_are_not_json(refusing: Scripted) -> None:
    for (path, body), expected in ((calls.chat(), 200), (calls.chat(calls.PARTS["image"]), 400)):
        text = json.dumps(body).encode()
        connection = http.client.HTTPConnection(refusing.server.host, refusing.server.port)
        pieces = (text[i : i + 50] for i in range(0, len(text), 50))
        connection.request("POST", path, pieces, calls.HEADERS, encode_chunked=True)
        answer = connection.getresponse()
        assert (answer.status, b"VISION_DISABLED" in answer.read()) == (expected, expected == 400)
        connection.close()
    for broken in (b"", b"{", b"\xff", b"[" * 100_000):
        connection = http.client.HTTPConnection(refusing.server.host, refusing.server.port)
        connection.request("POST", "/v1/messages", broken, calls.HEADERS)
        answer = connection.getresponse()
        assert answer.status == 400
        assert b"VISION_DISABLED" not in answer.read()
        connection.close()


def test_a_request_without_a_key_gets_only_401(refusing: Scripted) -> None:
    headers = {**calls.HEADERS, "Authorization": "Bearer another"}
    for make in (calls.chat, calls.messages):
        status, text = calls.post(refusing.server, make(calls.PARTS["image"]), headers)
        assert status == 401
        assert "VISION_DISABLED" not in text


NAMES = re.compile(
    r"((?:chatcmpl|resp|msg|cmpl|call|rs|fc)[-_])\w+"
    r'|("(?:created|created_at|completed_at|id)": ?)"?\d+"?'
)


def test_with_vision_nothing_changes(pair: tuple[Scripted, Scripted]) -> None:
    extended, stock = pair
    different, refused = [], 0
    for name, request in {**ANSWERED, **REFUSED}.items():
        (status, text), (expected, stock_text) = extended.post(request), stock.post(request)
        refused += expected == 400
        if status != expected or NAMES.sub(r"\1\2", text) != NAMES.sub(r"\1\2", stock_text):
            different.append((name, text, stock_text))
        assert "VISION_DISABLED" not in text
    assert different == []
    assert 0 < refused < len(REFUSED)  # stock refuses some of them and drops the others
    assert extended.log.read_text() == stock.log.read_text()


def test_the_log_says_that_the_extension_is_active(pair: tuple[Scripted, Scripted]) -> None:
    extended, stock = (one.server.log.read_text() for one in pair)
    assert "Qwen3-VL extension" in extended
    assert "Qwen3-VL extension" not in stock
