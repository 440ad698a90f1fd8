"""Refusals without HTTP: `pipeline` in all its forms, the async engine, TurboMind and the commands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.checkpoints import write_checkpoint
from tests.host_runtime.checkpoints import write_text_checkpoint
from tests.host_runtime.runner import ROOT, environment, run
from tests.lmdeploy_ext.vision_off.samples import PARTS, PIXEL

pytestmark = [pytest.mark.slow, pytest.mark.host]  # imports lmdeploy in processes of their own

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "hi"}, PARTS["image_url"]]}]
ALIAS = [{"role": "tool", "content": [PARTS["input_image"]]}]
TEXT = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]


@pytest.fixture(scope="module")
def vision_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_checkpoint(tmp_path_factory.mktemp("text"))


# In the child


def pipeline_on(checkpoint: str, **options: Any) -> Any:
    import lmdeploy

    from tests.lmdeploy_ext.vision_off.scripted import use_scripted_engine

    use_scripted_engine()
    return lmdeploy.pipeline(checkpoint, **options)


def with_images(pipe: Any) -> dict[str, Callable[[], Any]]:
    from PIL import Image

    image = Image.new("RGB", (32, 32))
    pair = ("describe", image)
    return {
        "pair": lambda: pipe(pair),
        "pair, image first": lambda: pipe((image, "describe")),
        "pair, several images": lambda: pipe(("describe", [image, image])),
        "pair, address": lambda: pipe(("describe", "http://127.0.0.1:9/x.png")),
        "pair, data": lambda: pipe(("describe", PIXEL)),
        "messages": lambda: pipe(MESSAGES),
        "messages, alias": lambda: pipe(ALIAS),
        "messages, object": lambda: pipe([{"role": "user", "content": ["hi", image]}]),
        "batch of pairs": lambda: pipe([pair, pair]),
        "batch of messages": lambda: pipe([TEXT, MESSAGES]),
        "infer": lambda: pipe.infer(pair),
        "batch_infer": lambda: pipe.batch_infer([pair]),
        "stream_infer": lambda: list(pipe.stream_infer(pair)),
        "stream_infer, messages": lambda: list(pipe.stream_infer(MESSAGES)),
        "stream_infer, session": lambda: list(pipe.stream_infer(MESSAGES, sessions=pipe.session())),
        "chat": lambda: pipe.chat(pair),
        "chat, stream": lambda: list(pipe.chat(pair, stream_response=True)),
    }


def with_text(pipe: Any) -> dict[str, Callable[[], Any]]:
    return {
        "prompt": lambda: [pipe("hi")],
        "batch": lambda: pipe(["hi", "ho"]),
        "messages": lambda: [pipe(TEXT)],
        "batch of messages": lambda: pipe([TEXT, TEXT]),
        "stream_infer": lambda: list(pipe.stream_infer("hi")),
        "chat": lambda: [pipe.chat("hi").response],
    }


def outcome(call: Callable[[], Any]) -> list[str]:
    try:
        answer = call()
    except ValueError as error:
        return ["ValueError", type(error).__name__, str(error)]
    listed = answer if isinstance(answer, list) else [getattr(answer, "response", answer)]
    return [
        f"{one.text} {one.finish_reason} {one.error_code} {one.error_message}" for one in listed
    ]


def ask_pipeline(checkpoint: str, *, installed: bool, **options: Any) -> dict[str, Any]:
    if installed:
        import lmdeploy_ext

        lmdeploy_ext.install()
    pipe = pipeline_on(checkpoint, **options)
    found = {
        "images": {name: outcome(call) for name, call in with_images(pipe).items()},
        "text": {name: outcome(call) for name, call in with_text(pipe).items()},
        "sessions": len(pipe.session_mgr.sessions),
        "engine": type(pipe.async_engine).__name__,
    }
    pipe.close()
    return found


def ask_configured_pipeline(checkpoint: str) -> list[Any]:
    """LMDeploy's own option does the same; the caller's configuration stays as it was."""
    from lmdeploy import TurbomindEngineConfig

    import lmdeploy_ext

    lmdeploy_ext.install()
    mine = TurbomindEngineConfig(session_len=256)
    found: list[Any] = []
    for options in (
        {"backend_config": mine, "disable_vision": True},
        {"backend_config": mine, "disable_vision_encoder": True},
        {"backend_config": TurbomindEngineConfig(language_model_only=True)},
        {"backend_config": TurbomindEngineConfig(session_len=128, disable_vision_encoder=True)},
    ):
        pipe = pipeline_on(checkpoint, **options)
        found.append(outcome(lambda: pipe(MESSAGES))[:2])  # noqa: B023
        found.append(pipe.backend_config.session_len)
        pipe.close()
    return [*found, mine.language_model_only]


def parse_flags() -> list[bool]:
    import argparse

    from lmdeploy.cli.utils import ArgumentHelper

    import lmdeploy_ext

    lmdeploy_ext.install()
    parser = argparse.ArgumentParser()
    ArgumentHelper.language_model_only(parser)
    words: list[list[str]] = [[], ["--disable-vision"], ["--disable-vision-encoder"]]
    return [parser.parse_args(given).language_model_only for given in words]


def ask_engine(checkpoint: str) -> dict[str, Any]:
    """The async engine by itself, as an endpoint that is not ours would use it."""
    import asyncio

    from lmdeploy.serve.core.exceptions import RequestError
    from lmdeploy.serve.openai.errors import create_request_error_response

    import lmdeploy_ext

    lmdeploy_ext.install()
    engine = pipeline_on(checkpoint, disable_vision=True).async_engine
    found: dict[str, Any] = {}
    for name, part in PARTS.items():
        for role in ("system", "user", "assistant", "tool"):
            session = engine.session_mgr.get()
            try:
                asyncio.run(engine.preprocess([{"role": role, "content": [part]}], session))
            except RequestError as error:
                answer = create_request_error_response(error)
                found[f"{name}, {role}"] = [answer.status_code, error.message]
    request = asyncio.run(engine.preprocess(TEXT, engine.session_mgr.get()))
    sessions = len(engine.session_mgr.sessions)
    return {"refused": found, "sessions": sessions, "tokens": request.input_token_len}


def convert() -> dict[str, list[Any]]:
    """`TurboMind.mm_input_converter` on nothing, on an empty list and on images."""
    import lmdeploy_ext

    lmdeploy_ext.install()
    from lmdeploy.turbomind import TurboMind

    found: dict[str, list[Any]] = {"disabled": [], "enabled": []}
    for mode, told in found.items():
        engine = SimpleNamespace(
            engine_config=SimpleNamespace(language_model_only=mode == "disabled"),
            source_model=SimpleNamespace(to_turbomind_multimodal=len),
        )
        for given in (None, [], [{"modality": "image"}]):
            try:
                told.append(TurboMind.mm_input_converter(engine, given))
            except ValueError as error:
                told.append(str(error))
    return found


# Tests


def test_pipeline_refuses_images_in_every_form(vision_checkpoint: Path, tmp_path: Path) -> None:
    extra = {"SCRIPTED_LOG": str(tmp_path / "log")}
    options = {"installed": True, "disable_vision": True}
    found = run(ask_pipeline, vision_checkpoint, mode="driver", extra=extra, **options)
    for name, told in found["images"].items():
        assert told[:2] == ["ValueError", "VisionDisabledError"], (name, told)
        assert told[2].startswith("VISION_DISABLED: "), name
    for name, told in found["text"].items():
        assert "".join(told).startswith("I"), (name, told)
        assert "error" not in "".join(told), (name, told)
    assert found["engine"] == "AsyncEngine"  # the one without an image encoder
    assert found["sessions"] == 0
    reached = (tmp_path / "log").read_text().splitlines()
    assert len(reached) == 8


def test_a_pipeline_with_vision_is_the_stock_one(text_checkpoint: Path, tmp_path: Path) -> None:
    extra = {"SCRIPTED_LOG": str(tmp_path / "log")}
    ours, stock = (
        run(ask_pipeline, text_checkpoint, mode="driver", extra=extra, installed=installed)
        for installed in (True, False)
    )
    assert ours == stock
    assert "error" in stock["images"]["messages"][0]


def test_every_way_to_configure_a_pipeline(vision_checkpoint: Path, tmp_path: Path) -> None:
    extra = {"SCRIPTED_LOG": str(tmp_path / "log")}
    refused = ["ValueError", "VisionDisabledError"]
    found = run(ask_configured_pipeline, vision_checkpoint, mode="driver", extra=extra)
    assert found == [refused, 256, refused, 256, refused, 1024, refused, 128, False]


def test_both_spellings_of_the_flag_disable_vision() -> None:
    assert run(parse_flags, mode="driver") == [False, True, True]


def test_the_engine_refuses_by_itself(vision_checkpoint: Path, tmp_path: Path) -> None:
    extra = {"SCRIPTED_LOG": str(tmp_path / "log")}
    found = run(ask_engine, vision_checkpoint, mode="driver", extra=extra)
    assert found["refused"].keys() == {
        f"{name}, {role}" for name in PARTS for role in ("system", "user", "assistant", "tool")
    }
    for name, (status, said) in found["refused"].items():
        assert status == 400, name
        assert said.startswith("VISION_DISABLED: messages[0].content[0]"), name
    assert found["sessions"] == 1  # the one of the text
    assert found["tokens"] > 0


def test_turbomind_raises_instead_of_dropping() -> None:
    found = run(convert, mode="driver")
    assert found["enabled"] == [None, None, 1]
    *nothing, images = found["disabled"]
    assert nothing == [None, None]
    assert images.startswith("VISION_DISABLED")


def test_a_chat_refuses_an_image_and_goes_on(vision_checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = [sys.executable, "-m", "tests.lmdeploy_ext.vision_off.scripted", "chat"]
    done = subprocess.run(
        [*words, str(vision_checkpoint), "--disable-vision"],
        input="/image x.png\ndescribe\n\nhi\n\nexit\n\n",
        env=environment("driver", extra={"SCRIPTED_LOG": str(log)}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Error: VISION_DISABLED") == 1
    assert done.stdout.count("IJK") == 1
    assert done.stdout.index("VISION_DISABLED") < done.stdout.index("IJK")
    assert len(log.read_text().splitlines()) == 1
