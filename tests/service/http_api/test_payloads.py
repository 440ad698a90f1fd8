"""Base64 that is taken out of a body before it is read as JSON: nothing else changes."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ImageError
from service.http_api.chat_codec import decode_chat
from service.http_api.images import decode_base64
from service.http_api.payloads import LEAST_BYTES, MARK, NAME, Payloads
from service.inference.calls import InlineTask
from service.settings import Settings
from service.types import TextPart
from tests.service.http_api.harness import image_part, request, shown

LONG = bytes(range(256)) * 32
LARGE = bytes(range(256)) * 3000


def decoded(document: Any) -> tuple[list[bytes], list[str]]:
    """The images and the texts of a request."""
    call = decode_chat(Payloads(json.dumps(document).encode()), Settings()).call
    assert isinstance(call.task, InlineTask)
    parts = [part for message in call.task.messages for part in message.parts]
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    return [image.data for image in call.images], texts


def test_images_are_what_was_sent() -> None:
    content = shown("a", LONG, "b", b"short", LARGE)
    payloads = Payloads(json.dumps(request(messages=content)).encode())
    assert len(payloads.lean) < LEAST_BYTES
    assert decoded(request(messages=content)) == ([LONG, b"short", LARGE], ["a", "b"])


def test_a_text_that_looks_like_an_image_stays_a_text() -> None:
    url = "data:image/png;base64," + base64.b64encode(LONG).decode()
    content = shown(url, LONG, f'he said "{url}"')
    images, texts = decoded(request(messages=content))
    assert images == [LONG]
    assert texts == [url, f'he said "{url}"']


@pytest.mark.parametrize("end", ['"', "", '\\"'])
def test_bodies_that_end_early_stay_as_they_are(end: str) -> None:
    body = b'{"a": "data:x;base64,' + b"A" * LEAST_BYTES + end.encode()
    assert Payloads(body).lean == body or end == '"'


SPAN = st.sampled_from(
    [MARK, b'"', b"\\", b'"data:', b"A" * LEAST_BYTES, b"x", b"{", b"data:", '"ü'.encode()]
)


@given(st.lists(SPAN, max_size=12))
def test_what_is_taken_out_can_be_put_back(spans: list[bytes]) -> None:
    body = b"".join(spans)
    payloads = Payloads(body)
    back = payloads.lean
    for index, taken in enumerate(payloads._found):
        name = f"{index}".encode()
        before, found, after = back.partition(MARK + NAME.encode() + name + b'"')
        assert found
        back = before + MARK + bytes(taken) + b'"' + after
    assert back == body


@given(st.binary(min_size=1, max_size=64))
def test_base64_is_decoded_with_and_without_padding(data: bytes) -> None:
    text = base64.b64encode(data)
    assert decode_base64(text, "f") == data
    assert decode_base64(memoryview(text), "f") == data
    assert decode_base64(text.rstrip(b"="), "f") == data


@pytest.mark.parametrize("text", ["=", "====", "A", "A===", "AA=A", "AAA==", "AAAA====", "AAAA="])
def test_padding_that_is_wrong_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="base64"):
        decode_base64(text.encode(), "f")


@given(st.binary(min_size=1, max_size=16), st.sampled_from(b"-_!=\n \xff"), st.integers(0, 20))
def test_other_characters_are_refused(data: bytes, wrong: int, place: int) -> None:
    text = base64.b64encode(data).rstrip(b"=")
    place = min(place, len(text) - 1)
    with pytest.raises(ImageError, match="base64"):
        decode_base64(text[:place] + bytes([wrong]) + text[place:], "f")


@pytest.mark.parametrize("place", [0, 1, 5000, 1_000_000])
def test_other_characters_are_refused_in_large_texts(place: int) -> None:
    text = bytearray(base64.b64encode(LARGE))
    text[place] = ord("*")
    with pytest.raises(ImageError, match="base64"):
        decode_base64(bytes(text), "f")


def test_a_bare_url_may_be_large() -> None:
    part = {"type": "image_url", "image_url": image_part(LONG)["image_url"]["url"]}
    assert decoded(request(messages=[{"role": "user", "content": [part]}]))[0] == [LONG]
