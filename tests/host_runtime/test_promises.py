"""The promises of `lmdeploy serve` with the extension, as the OpenAI client sees them.

Two servers run on the host runtime, which computes the numbers: one keeps the promises, the other
has them switched off, and is LMDeploy as it is.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
import pytest
from PIL import Image

from tests.host_runtime.server import Server, serve

pytestmark = [pytest.mark.slow, pytest.mark.host]

MODEL = "tiny"
TOKENS = 6
OFF = {"LMDEPLOY_QWEN3VL_IMAGES": "off", "LMDEPLOY_QWEN3VL_GRAMMARS": "off"}


class Client(NamedTuple):
    """The OpenAI client of a server."""

    server: Server
    openai: openai.OpenAI

    @property
    def log(self) -> str:
        return self.server.log.read_text(errors="replace")

    def ask(self, content: Any, **options: Any) -> Any:
        options = {"max_completion_tokens": TOKENS, "temperature": 0, **options}
        messages = [{"role": "user", "content": content}]
        return self.openai.chat.completions.create(model=MODEL, messages=messages, **options)

    def sees(self, *files: bytes) -> list[str]:
        """The tokens of the greedy answer about images, which depend on their pixels. The text
        would depend on how many tokens arrive at a time: LMDeploy drops incomplete characters."""
        options = {"top_k": 1, "ignore_eos": True}
        answer = self.ask([*map(part, files), TEXT], extra_body=options, logprobs=True)
        tokens = [one.token for one in answer.choices[0].logprobs.content]
        assert len(tokens) == TOKENS
        return tokens

    def refused(self, content: Any, **options: Any) -> str:
        """The message of a request that is refused with HTTP 400 and LMDeploy's error form."""
        with pytest.raises(openai.BadRequestError) as caught:
            self.ask(content, **options)
        body: Any = caught.value.body
        assert body["type"] == "invalid_request_error"
        assert body["code"] == 400
        return str(body["message"])


@pytest.fixture(scope="module")
def servers(
    vision_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Client, Client]]:
    checkpoint = vision_checkpoint(vision_head=64)

    with ExitStack() as stack, ThreadPoolExecutor() as threads:

        def start(variables: dict[str, str]) -> Client:
            folder = tmp_path_factory.mktemp("serve")
            variables = {"LMDEPLOY_QWEN3VL": "1", **variables}
            options = ("--model-name", MODEL, "--disable-metrics")
            serving = serve(checkpoint, folder, *options, mode="numbers", extra=variables)
            server = stack.enter_context(serving)
            url = f"{server.url}/v1"
            return Client(
                server, openai.OpenAI(base_url=url, api_key="none", timeout=120, max_retries=0)
            )

        kept, off = threads.map(start, ({"LMDEPLOY_QWEN3VL_VIDEO": "off"}, OFF))
        yield kept, off


@pytest.fixture(scope="module")
def kept(servers: tuple[Client, Client]) -> Client:
    return servers[0]


@pytest.fixture(scope="module")
def off(servers: tuple[Client, Client]) -> Client:
    return servers[1]


TEXT = {"type": "text", "text": "What is left?"}


# Images


def part(data: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(seed: int = 3) -> Image.Image:
    """128 x 96, different in every quarter."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((128, 96), Image.Resampling.NEAREST)


def rotated() -> tuple[bytes, bytes]:
    """A photo with orientation 6, and what a viewer shows."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = encoded(scene(), "JPEG", quality=95, exif=exif)
    return photo, encoded(Image.open(io.BytesIO(photo)).transpose(Image.Transpose.ROTATE_270))


def sixteen_bits() -> tuple[bytes, bytes]:
    grey = np.asarray(scene().convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    return encoded(deep), encoded(Image.fromarray(grey))


def transparent() -> tuple[bytes, bytes]:
    """Black below the transparent half; viewers show a white page."""
    image = scene()
    clear = Image.new("L", image.size, 255)
    clear.paste(0, (0, 0, 64, 96))
    layered = image.copy()
    layered.paste((0, 0, 0), (0, 0, 64, 96))
    layered.putalpha(clear)
    image.paste((255, 255, 255), (0, 0, 64, 96))
    return encoded(layered), encoded(image)


def palette() -> tuple[bytes, bytes, bytes]:
    """A palette whose transparent colour, in the left half, is black; what a viewer shows; and the
    same without transparency."""
    clear, half = 12, (0, 0, 64, 96)
    image = scene().quantize(clear)
    image.putpalette([*image.getpalette()[: 3 * clear], 0, 0, 0])  # type: ignore[index]
    shown = image.convert("RGB")
    shown.paste((255, 255, 255), half)
    image.paste(clear, half)
    return encoded(image, transparency=clear), encoded(shown), encoded(image)


READ = {"rotated": rotated, "16 bits": sixteen_bits, "transparent": transparent}


@pytest.mark.parametrize("name", READ)
def test_an_image_is_read_as_people_see_it(kept: Client, off: Client, name: str) -> None:
    file, shown = READ[name]()
    wanted = kept.sees(shown)
    assert off.sees(shown) == wanted
    assert kept.sees(file) == wanted
    assert off.sees(file) != wanted, "stock LMDeploy reads it, too: the promise is not needed"


def test_a_palette_is_read_with_its_transparent_colour(kept: Client) -> None:
    file, shown, opaque = palette()
    wanted = kept.sees(shown)
    assert kept.sees(file) == wanted
    assert kept.sees(opaque) != wanted


def test_a_cmyk_photo_is_read(kept: Client) -> None:
    photo = encoded(scene().convert("CMYK"), "JPEG", quality=95)
    assert kept.sees(photo) == kept.sees(encoded(Image.open(io.BytesIO(photo)).convert("RGB")))


PHOTO = encoded(scene(), "JPEG", quality=95)
HUGE = encoded(Image.new("1", (12_000, 8_400)))
BAD = {
    "truncated JPEG": (PHOTO[:-100], "IMAGE_TRUNCATED", "send the whole file"),
    "truncated PNG": (encoded(scene())[:-100], "IMAGE_TRUNCATED", "send the whole file"),
    "no image": (b"<html>not found</html>", "IMAGE_FORMAT_UNSUPPORTED", "is an HTML page"),
    "GIF": (encoded(scene(), "GIF"), "IMAGE_FORMAT_UNSUPPORTED", "save a frame as PNG"),
    "huge": (HUGE, "IMAGE_TOO_MANY_PIXELS", "12000x8400"),
    "sliver": (encoded(Image.new("1", (4000, 2))), "IMAGE_ASPECT_RATIO", "4000x2"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_an_image_that_cannot_be_read_is_refused(kept: Client, name: str, stream: bool) -> None:
    data, reason, said = BAD[name]
    message = kept.refused([TEXT, part(PHOTO), part(data)], stream=stream)
    assert message.startswith(f"{reason}: messages[0].content[2] ")
    assert said in message


def test_stock_answers_about_a_truncated_image_and_names_no_other(off: Client) -> None:
    assert off.sees(BAD["truncated JPEG"][0])
    assert off.refused([TEXT, part(BAD["no image"][0])]) == "Request preprocessing failed."


def test_an_image_is_named_by_its_place_in_the_conversation(kept: Client) -> None:
    def conversation(bad: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": [part(PHOTO), TEXT]},
            {"role": "assistant", "content": "A square."},
            {"role": "user", "content": [TEXT, bad]},
        ]

    for url, said in (
        ("data:image/png;base64,AAAA", "IMAGE_FORMAT_UNSUPPORTED: messages[2].content[1] "),
        ("http://127.0.0.1:9/x.png", "messages[2].content[1]: URL is blocked"),
        ("data:image/png,x", "messages[2].content[1]: Invalid data URL"),
        ("data:image/png;base64", "messages[2].content[1]: Invalid data URL"),
    ):
        bad = {"type": "image_url", "image_url": {"url": url}}
        with pytest.raises(openai.BadRequestError) as caught:
            kept.openai.chat.completions.create(
                model=MODEL, messages=conversation(bad), max_completion_tokens=2  # type: ignore[arg-type]
            )  # fmt: skip
        body: Any = caught.value.body
        assert body["message"].startswith(said), body


@pytest.mark.parametrize("kind", ["video_url", "video"])
def test_video_is_refused_where_it_is_switched_off(kept: Client, kind: str) -> None:
    message = kept.refused([TEXT, {"type": kind, kind: {"url": "data:video/mp4;base64,AAAA"}}])
    assert message.startswith("VIDEO_DISABLED: messages[0].content[1] is video")
    assert "LMDEPLOY_QWEN3VL_VIDEO=off" in message


def test_the_log_shows_the_promises(kept: Client, off: Client) -> None:
    (line,) = [one for one in kept.log.splitlines() if "Qwen3-VL extension" in one]
    assert (
        "grammars are enforced or refused, images are checked and read upright, video is refused; "
        "TurboMind serves" in line
    )
    (line,) = [one for one in off.log.splitlines() if "Qwen3-VL extension" in one]
    assert (
        "grammars are handled by stock LMDeploy, images are read as by stock LMDeploy, video is "
        "decoded by stock LMDeploy; " in line
    )


# Grammars


def schema(content: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": content}}


def regex(text: str) -> dict[str, Any]:
    return {"type": "regex_schema", "regex_schema": text}


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        found = {"type": "object", "properties": {"a": found}, "required": ["a"]}
    return found


UNUSABLE: dict[str, tuple[dict[str, Any], str, int]] = {
    "unknown type": (
        schema({"type": "strnig"}),
        'SCHEMA_UNSUPPORTED: response_format json_schema cannot be compiled: Unsupported type "str',
        400,
    ),
    "unsatisfiable": (
        schema({"type": "integer", "minimum": 5, "maximum": 3}),
        "SCHEMA_UNSUPPORTED: response_format json_schema cannot be compiled: Invalid range",
        400,
    ),
    "look-ahead": (
        schema({"type": "string", "pattern": "(?=a)b"}),
        "SCHEMA_UNSUPPORTED: response_format json_schema would not be enforced as it is: Lookahead",
        500,
    ),
    "refused by TurboMind alone": (
        schema({"anyOf": []}),
        "SCHEMA_UNSUPPORTED: response_format json_schema cannot be compiled by TurboMind: ",
        500,
    ),
    "reference to another document": (
        schema({"$ref": "https://example.com/schema.json"}),
        "SCHEMA_UNSUPPORTED: response_format json_schema would not be enforced as it is: URI",
        200,
    ),
    "several schemas at once": (
        schema({"allOf": [{"type": "integer"}, {"minimum": 3}]}),
        "SCHEMA_UNSUPPORTED: response_format json_schema would not be enforced as it is: Support",
        200,
    ),
    "multiple in a range": (
        schema({"type": "integer", "multipleOf": 3, "minimum": 1}),
        "SCHEMA_UNSUPPORTED: response_format json_schema would not be enforced as it is: range",
        200,
    ),
    "expression and length": (
        schema({"type": "string", "pattern": "^a+$", "maxLength": 3}),
        "SCHEMA_UNSUPPORTED: response_format json_schema would not be enforced as it is: pattern",
        200,
    ),
    "no schema": (
        {"type": "json_schema"},
        "GRAMMAR_INVALID: response_format cannot be read: Cannot parse schema None",
        400,
    ),
    "broken expression": (
        regex("("),
        "GRAMMAR_INVALID: response_format regex_schema cannot be compiled: Regex parsing error",
        400,
    ),
    "no text": (
        regex(r"[^\s\S]"),
        "GRAMMAR_INVALID: response_format regex_schema matches no text",
        200,
    ),
    "no expression": (
        {"type": "regex_schema"},
        "GRAMMAR_INVALID: response_format has no regex_schema",
        200,
    ),
}
"""``response_format``, the message with the promise, and the HTTP status of stock LMDeploy."""


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_grammar_that_cannot_be_enforced_is_refused(kept: Client, off: Client, name: str) -> None:
    form, said, stock = UNUSABLE[name]
    for stream in (False, True):
        message = kept.refused([TEXT], response_format=form, stream=stream)
        assert message.startswith(said)
        assert ".cc:" not in message
    try:
        off.ask([TEXT], response_format=form)
        status = 200
    except openai.APIStatusError as error:
        status = error.status_code
    assert status == stock


def test_stock_breaks_a_stream_that_has_begun(off: Client) -> None:
    form, _, _ = UNUSABLE["refused by TurboMind alone"]
    stream = off.ask([TEXT], response_format=form, stream=True)  # HTTP 200
    with pytest.raises(openai.APIError):
        list(stream)


def test_a_grammar_that_takes_minutes_is_refused(kept: Client) -> None:
    """Stock LMDeploy answers nobody as long as it compiles."""
    message = kept.refused([TEXT], response_format=schema(nested(400)))
    assert message.startswith("GRAMMAR_TOO_COSTLY: response_format json_schema takes more than 3 s")


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_is_enforced(kept: Client, stream: bool) -> None:
    def answer(form: dict[str, Any], limit: int = 60) -> tuple[str, str]:
        found = kept.ask([TEXT], response_format=form, max_completion_tokens=limit, stream=stream)
        if not stream:
            return found.choices[0].message.content, found.choices[0].finish_reason
        chunks = [one.choices[0] for one in found if one.choices]
        return "".join(one.delta.content or "" for one in chunks), chunks[-1].finish_reason

    form = schema({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2})
    text, reason = answer(form)
    assert [type(one) for one in json.loads(text)] == [bool, bool]
    assert reason == "stop"
    assert answer(regex("(left|right)"))[0] in ("left", "right")
    text, reason = answer({"type": "json_object"}, 8)
    assert text.lstrip().startswith("{")
    # LMDeploy returns an answer that is cut at the limit; only its finish_reason says so.
    text, reason = answer(form, 1)
    assert reason == "length"
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(text)


def test_the_responses_api_refuses_a_grammar_in_its_own_form(kept: Client) -> None:
    form = {"type": "json_schema", "name": "answer", "schema": {"type": "strnig"}}
    request = {"model": MODEL, "input": "hi", "text": {"format": form}, "max_output_tokens": 2}
    for stream in (False, True):
        status, text = kept.server.call("/v1/responses", {**request, "stream": stream})
        assert status == 400, text
        error = json.loads(text)["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith("SCHEMA_UNSUPPORTED: response_format json_schema")


def test_refused_requests_leave_nothing_behind(kept: Client) -> None:
    assert kept.sees(PHOTO) == kept.sees(PHOTO)
    assert "Traceback" not in kept.log
