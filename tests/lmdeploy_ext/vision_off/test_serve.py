"""The whole of `lmdeploy serve api_server` on the host runtime: TurboMind itself, without its tower."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmdeploy_ext.autoload import VARIABLE
from tests.host_runtime.runner import run
from tests.host_runtime.server import LMDEPLOY, serve
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape, write_engine_checkpoint
from tests.lmdeploy_ext.vision_off import calls

pytestmark = [
    pytest.mark.slow,
    pytest.mark.host,
]  # starts `lmdeploy serve api_server` and TurboMind

IMAGE = calls.chat(calls.PARTS["image_url"], max_tokens=3)
OPTIONS = ("--model-name", calls.MODEL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine_checkpoint(tmp_path_factory.mktemp("checkpoint"), EngineShape())


def weights(checkpoint: str) -> dict[str, dict[str, int]]:
    """Path of every parameter that the engine gets -> bytes, with vision and without."""
    import lmdeploy_ext

    lmdeploy_ext.install()
    from tests.host_runtime.weights import exported

    return {
        name: {path: t.nbytes for path, t in exported(checkpoint, language_model_only=off).items()}
        for name, off in (("with", False), ("without", True))
    }


def test_the_tower_is_not_loaded(checkpoint: Path) -> None:
    found = run(weights, checkpoint)
    text = {path: size for path, size in found["with"].items() if "vision" not in path}
    assert len(text) < len(found["with"])
    assert found["without"] == text


@pytest.mark.parametrize(
    ("command", "option", "variable"),
    [
        (LMDEPLOY, "--disable-vision", "1"),
        ((sys.executable, "-m", "lmdeploy_ext"), "--language-model-only", ""),
    ],
    ids=["lmdeploy", "python -m lmdeploy_ext"],
)
def test_text_is_answered_and_images_are_refused(
    command: tuple[str, ...], option: str, variable: str, checkpoint: Path, tmp_path: Path
) -> None:
    extra = {VARIABLE: variable}
    with serve(checkpoint, tmp_path, *OPTIONS, option, command=command, extra=extra) as server:
        assert "Qwen3-VL extension" in server.log.read_text()
        for stream in (False, True):
            for make in (calls.chat, calls.completions, calls.messages, calls.responses):
                limit = "max_output_tokens" if make is calls.responses else "max_tokens"
                status, text = calls.post(server, make(stream=stream, **{limit: 3}))
                assert status == 200, text
                assert "error" not in text.replace('"error":null', "")
                part = calls.PARTS["input_image" if make is calls.responses else "image"]
                status, text = calls.post(server, make(part, stream=stream))
                assert status == 400, text
                assert "VISION_DISABLED" in text


def test_with_vision_the_armed_command_answers_about_an_image(
    checkpoint: Path, tmp_path: Path
) -> None:
    with serve(checkpoint, tmp_path, *OPTIONS, extra={VARIABLE: "1"}) as server:
        status, text = calls.post(server, IMAGE)
        assert status == 200, text
        log = server.log.read_text()
    assert "Qwen3-VL extension" in log
    assert "Fallback to pytorch" not in log
