"""Images of `pipeline`, `load_image` and `lmdeploy chat`: read as people see them, or refused."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import write_checkpoint
from tests.host_runtime.checkpoints import write_vision_checkpoint
from tests.host_runtime.runner import ROOT, environment, run
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape

pytestmark = [pytest.mark.slow, pytest.mark.host]  # imports lmdeploy in processes of their own


def scene() -> Image.Image:
    """64 x 32, another colour in each quarter."""
    colours = [[(200, 30, 30), (30, 200, 30)], [(30, 30, 200), (220, 220, 40)]]
    return Image.fromarray(np.array(colours, np.uint8)).resize((64, 32), Image.Resampling.NEAREST)


def write(folder: Path) -> dict[str, str]:
    """Files by name, and what a viewer shows of each in ``NAME.shown.png``."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = scene()
    paths = {name: str(folder / f"{name}.png") for name in ("turned", "deep", "clear", "cut")}
    image.save(paths["turned"], exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(folder / "turned.shown.png")
    grey = np.asarray(image.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(paths["deep"])
    Image.fromarray(grey).convert("RGB").save(folder / "deep.shown.png")
    clear = image.copy()
    clear.putalpha(0)
    clear.save(paths["clear"])
    Image.new("RGB", image.size, "white").save(folder / "clear.shown.png")
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    Path(paths["cut"]).write_bytes(buffer.getvalue()[:-2000])
    return paths


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write(tmp_path_factory.mktemp("images"))


# In the child


def _message(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def _same(image: Image.Image, path: str) -> bool:
    shown = Image.open(path.replace(".png", ".shown.png"))
    return image.mode == shown.mode and np.array_equal(np.asarray(image), np.asarray(shown))


def read(paths: dict[str, str], *, installed: bool) -> dict[str, Any]:
    """Whether each image is read as a viewer shows it, by the way in which it is given."""
    import asyncio

    from lmdeploy.serve.processors import MultimodalProcessor
    from lmdeploy.vl import load_image

    import lmdeploy_ext

    if installed:
        lmdeploy_ext.install("off")

    def parsed(part: dict[str, Any]) -> Any:
        messages = asyncio.run(MultimodalProcessor.async_parse_multimodal_item(_message(part)))
        return messages[0]["content"][0]["data"].convert("RGB")

    def chat(path: str) -> Any:
        (block,) = import_module("lmdeploy.cli.chat").parse_interactive_prompt(f"/image {path}")
        return parsed(block)

    ways: dict[str, Callable[[str], Any]] = {
        "path": lambda path: parsed({"type": "image_url", "image_url": {"url": path}}),
        "path alone": lambda path: parsed({"type": "image", "image": path}),
        "Pillow": lambda path: parsed({"type": "image_data", "image_data": {"data": Image.open(path)}}),
        "Pillow alone": lambda path: parsed({"type": "image", "image": Image.open(path)}),
        "load_image": load_image,
        "chat": chat,
    }  # fmt: skip
    found: dict[str, Any] = {}
    for way, take in ways.items():
        for name, path in paths.items():
            try:
                image = take(path)
                found[f"{name}, {way}"] = name != "cut" and _same(image, path)
            except ValueError as error:
                found[f"{name}, {way}"] = str(error)
    return found


def refused(path: str) -> dict[str, str]:
    """Errors of parts that are not images, as LMDeploy's parser raises them."""
    import asyncio

    from lmdeploy.serve.processors import MultimodalProcessor

    import lmdeploy_ext
    from lmdeploy_ext.images.files import ImageLimits
    from lmdeploy_ext.media import guard

    lmdeploy_ext.install("off")
    guard.LIMITS = ImageLimits(max_request_pixels=3 * 64 * 32)
    good = {"type": "image_url", "image_url": {"url": path}}
    text = {"type": "text", "text": "hi"}
    cases: dict[str, list[dict[str, Any]]] = {
        "no file": _message(text, {"type": "image_url", "image_url": {"url": "file:///nowhere/x"}}),
        "unknown type": _message(text, text, {"type": "hologram"}),
        "long": _message({"type": "image_url", "image_url": {"url": "data:" + "x" * 10_000}}),
        "sum": _message(good, good, good, good),
        "sum of messages": [*_message(good, good), *_message(good, good)],
        "option": _message(text),
    }
    found: dict[str, str] = {}
    for name, messages in cases.items():
        try:
            asyncio.run(MultimodalProcessor.async_parse_multimodal_item(messages))
            found[name] = "read"
        except ValueError as error:
            found[name] = str(error)
    return found


def ask_pipeline(checkpoint: str, cut: str) -> dict[str, Any]:
    """A pipeline on TurboMind: errors of images and of grammars."""
    from lmdeploy import GenerationConfig

    import lmdeploy_ext

    lmdeploy_ext.install("off")
    from tests.host_runtime import engines

    pipe = engines.pipeline(checkpoint)
    bad = GenerationConfig(response_format={"type": "regex_schema", "regex_schema": "("})
    good = GenerationConfig(max_new_tokens=2)
    calls: dict[str, Callable[[], Any]] = {
        "call": lambda: pipe("hi", gen_config=bad),
        "batch": lambda: pipe(["hi", "ho"], gen_config=[good, bad]),
        "stream_infer": lambda: list(pipe.stream_infer("hi", gen_config=bad)),
        "session": lambda: list(pipe.stream_infer("hi", sessions=pipe.session(), gen_config=bad)),
        "chat": lambda: pipe.chat("hi", gen_config=bad),
        "not an object": lambda: pipe("hi", gen_config=GenerationConfig(response_format="text")),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "answered"
        except ValueError as error:
            found[name] = f"{type(error).__name__}: {error}"
    image = {"type": "image_url", "image_url": {"url": cut}}
    answer = pipe(_message({"type": "text", "text": "hi"}, image), gen_config=good)
    found["image"] = [answer.text, answer.error_message]
    found["good"] = pipe("hi", gen_config=good).generate_token_len
    found["sessions"] = len(pipe.session_mgr.sessions)
    pipe.close()
    return found


# Tests


def test_images_are_read_as_people_see_them(paths: dict[str, str]) -> None:
    ours = run(read, paths, mode="driver", installed=True)
    stock = run(read, paths, mode="driver", installed=False)
    for name, seen in ours.items():
        if name.startswith("cut"):
            assert "ends before the image is complete; send the whole file" in seen, name
            places = {"load_image": "the image", "chat": f"IMAGE_TRUNCATED: {paths['cut']}"}
            way = name.partition(", ")[2]
            expected = places.get(way, "IMAGE_TRUNCATED: messages[0].content[0]")
            assert seen.startswith(expected), name
        else:
            assert seen is True, name
    assert not any(seen is True for name, seen in stock.items()), stock


def test_errors_name_the_place(paths: dict[str, str]) -> None:
    found = run(refused, paths["turned"], mode="driver")
    assert found["no file"] == (
        "messages[0].content[1]: cannot be fetched or opened (FileNotFoundError)"
    )
    assert found["unknown type"] == "messages[0].content[2]: unknown type: hologram"
    assert found["long"].startswith("messages[0].content[0]: Invalid data URL: data:xxx")
    assert len(found["long"]) < 400
    assert found["sum"].startswith("IMAGES_TOO_MANY_PIXELS: messages[0].content[3] and the images")
    assert found["option"] == "read"
    # Messages are read in threads: the sum counts those that have been read.
    assert found["sum of messages"] == "read" or "IMAGES_TOO_MANY" in found["sum of messages"]


def test_a_pipeline_raises_for_a_grammar(paths: dict[str, str], tmp_path: Path) -> None:
    checkpoint = write_vision_checkpoint(tmp_path, EngineShape(vision_head=64))
    found = run(ask_pipeline, checkpoint, paths["cut"])
    for name in ("call", "batch", "stream_infer", "session", "chat"):
        said = found[name]
        assert said.startswith("GrammarRefused: GRAMMAR_INVALID: response_format regex_schema"), (
            name
        )
    assert found["not an object"].endswith("response_format is not an object")
    text, message = found["image"]
    assert text == ""
    assert message.startswith("IMAGE_TRUNCATED: messages[0].content[1] ends before")
    assert found["good"] == 2
    assert found["sessions"] == 0


@pytest.mark.long
def test_a_chat_prints_the_error_of_an_image_and_goes_on(
    paths: dict[str, str], tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    words = [sys.executable, "-m", "tests.lmdeploy_ext.vision_off.scripted", "chat"]
    done = subprocess.run(
        [*words, str(checkpoint)],
        input=f"/image {paths['cut']}\ndescribe\n\nhi\n\nexit\n\n",
        env=environment("null", extra={"SCRIPTED_LOG": str(tmp_path / "log")}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"Error: IMAGE_TRUNCATED: {paths['cut']} ends before") == 1
    assert done.stdout.count("IJK") == 1
