"""What commands read: byte order marks, - for standard input, files that cannot be used; what they
write to a terminal that lacks characters."""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import subprocess
from pathlib import Path

import pytest

from service.cli.output import json_escapes
from service.engines.fake import FakeEngine
from service.types import GenerateRequest
from tests.service.cli.terminal import ROOT, called, command, qwen3vl
from tests.service.harness import failure, image_bytes, inline, run_request, running

SCHEMA = """{"type": "object", "properties": {"größe": {"type": "integer"}}, "required": ["größe"],
 "additionalProperties": false}"""
FITS = '{"größe": 3}'


class Recorder(FakeEngine):
    """Remembers what it was asked."""

    def __init__(self, text: str = "fine") -> None:
        super().__init__(self.told)
        self.text = text
        self.requests: list[GenerateRequest] = []

    def told(self, request: GenerateRequest) -> str:
        self.requests.append(request)
        return self.text


# Byte order marks


@pytest.mark.parametrize(
    "data",
    [
        codecs.BOM_UTF8 + SCHEMA.encode(),
        codecs.BOM_UTF16_LE + SCHEMA.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + SCHEMA.encode("utf-16-be"),
    ],
    ids=["utf-8", "utf-16-le", "utf-16-be"],
)
async def test_a_byte_order_mark_is_no_part_of_a_schema(tmp_path: Path, data: bytes) -> None:
    schema = tmp_path / "schema.json"
    schema.write_bytes(data)
    async with running(FakeEngine(FITS)) as started:
        at = ("--server", started.address)
        done = await called("run", *at, "--prompt", "x", "--schema", schema)
        judged = await called("schema", *at, schema)
        piped = await called("schema", *at, "-", stdin=data)
    assert (done.code, json.loads(done.out)) == (0, json.loads(FITS))
    assert (judged.code, piped.code) == (0, 0)


async def test_a_byte_order_mark_in_a_request_is_named() -> None:
    async with running() as started:
        request = run_request(inline(json_schema="\ufeff{}"))
        error = await failure(started.stub.RunTask(request, timeout=60))
    assert error.reason == "SCHEMA_NOT_JSON"
    assert "a byte order mark (U+FEFF) stands before it" in error.message


# Standard input


async def test_a_dash_is_standard_input(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(image_bytes(file_format="PNG"))
    engine = Recorder()
    marked = codecs.BOM_UTF8 + "Wie groß?".encode()
    async with running(engine) as started:
        engine.requests.clear()  # the warm-up
        run = ("run", "--server", started.address)
        shown = await called(*run, "--prompt", "x", image, "-", stdin=image_bytes(96, 96))
        asked = await called(*run, "--prompt", "-", image, stdin=marked)
        system = await called(*run, "--prompt", "x", "--system", "-", stdin=b"Be brief.")
        engine.text = FITS
        schema = await called(*run, "--prompt", "x", "--schema", "-", stdin=SCHEMA.encode())
        engine.text = "no"
        ebnf = await called(*run, "--prompt", "x", "--ebnf", "-", stdin=b'root ::= "no"')
    assert [done.code for done in (shown, asked, system, schema, ebnf)] == [0] * 5
    assert [(one.width, one.height) for one in engine.requests[0].images] == [(64, 48), (96, 96)]
    assert engine.requests[1].user == "Wie groß?"
    assert engine.requests[2].system == "Be brief."


async def test_a_dash_is_a_text_where_no_file_is_meant() -> None:
    async with running(FakeEngine("-")) as started:
        words = ("run", "--server", started.address, "--prompt", "x")
        for option in ("--regex", "--choice"):
            done = await called(*words, option, "-", stdin=b"")
            assert (done.code, done.out) == (0, "-\n")


async def test_standard_input_that_is_wrong_is_named() -> None:
    async with running() as started:
        at = ("--server", started.address)
        no_image = await called("analyze", *at, "-", stdin=b"no image")
        empty = await called("analyze", *at, "-", stdin=b"")
        no_text = await called("schema", *at, "-", stdin=b"\xff\xfe\xff")
    assert "(IMAGE_FORMAT_UNSUPPORTED): standard input" in no_image.err
    assert "(IMAGE_EMPTY): standard input: has no bytes" in empty.err
    assert no_text.code == 2
    assert "standard input cannot be read as UTF-8 text (FILE)" in " ".join(
        no_text.err.replace("│", " ").split()
    )


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["analyze", "-", "-"], "IMAGE and IMAGE"),
        (["run", "--prompt", "-", "-"], "IMAGE and --prompt"),
        (["run", "--prompt", "x", "--schema", "-", "-"], "IMAGE and --schema"),
        (["run", "--prompt", "-", "--system", "-", "--ebnf", "-"], "--prompt, --system and --ebnf"),
    ],
)
def test_standard_input_can_be_read_once(words: list[str], names: str) -> None:
    done = qwen3vl(*words, stdin=b"x")
    assert (done.code, done.out) == (2, "")
    text = " ".join(done.err.replace("│", " ").split())
    assert f"standard input can be read once, and - stands for it in {names}" in text


def test_help_tells_of_standard_input() -> None:
    for command_name, times in {"analyze": 1, "run": 5, "schema": 1}.items():
        text = " ".join(qwen3vl(command_name, "--help").out.replace("│", " ").split())
        assert text.count("- is standard input") == times


# Files that cannot be used


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["analyze", "{folder}"], "is a folder, not a file"),
        (["run", "--prompt", "x", "--schema", "{folder}"], "is a folder, not a file"),
        (["schema", "nowhere.json"], "there is no file nowhere.json"),
        (["analyze", "nowhere.jpg"], "there is no file nowhere.jpg"),
        (
            ["analyze", "/proc/self/mem"],
            "/proc/self/mem cannot be read (IMAGE): Input/output error",
        ),
        (["schema", "/proc/self/mem"], "/proc/self/mem cannot be read (FILE): Input/output error"),
        (["run", "--prompt", "\udcff"], "--prompt is not UTF-8 text"),
        (["run", "--prompt", "x", "--choice", "a\udcff"], "--choice is not UTF-8 text"),
        (["run", "--task", "\udcff"], "--task is not UTF-8 text"),
    ],
)
def test_inputs_that_cannot_be_used(tmp_path: Path, words: list[str], says: str) -> None:
    done = qwen3vl(*(word.format(folder=tmp_path) for word in words))
    assert (done.code, done.out) == (2, "")
    assert says in " ".join(done.err.replace("│", " ").split())


async def test_an_empty_image(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    async with running() as started:
        done = await called("analyze", "--server", started.address, tmp_path / "empty.jpg")
    assert done.code == 1
    assert done.err.startswith(
        f"INVALID_ARGUMENT (IMAGE_EMPTY): {tmp_path / 'empty.jpg'}: has no bytes"
    )


# Encodings of the output

ANSWER = '{"größe": "日本語 😀"}'


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
async def test_answers_on_a_terminal_of_any_encoding(tmp_path: Path, encoding: str) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    async with running(FakeEngine(ANSWER)) as started:

        def run(*words: object) -> str:
            done = subprocess.run(
                command("run", "--prompt", "x", "--server", started.address, *words),
                cwd=ROOT,
                env={**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"},
                capture_output=True,
                timeout=120,
            )
            assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
            return done.stdout.decode(encoding)

        pretty = await asyncio.to_thread(run, "--schema", schema)
        response = await asyncio.to_thread(run, "--schema", schema, "--json")
        stream = await asyncio.to_thread(run, "--schema", schema, "--stream")
        text = await asyncio.to_thread(run)
    assert json.loads(pretty) == json.loads(ANSWER)
    assert json.loads(json.loads(response)["result"]["json"]) == json.loads(ANSWER)
    assert json.loads(stream) == json.loads(ANSWER)
    assert "😀" in text if encoding == "utf-8" else "\\ud83d\\ude00" in text


@pytest.mark.slow
def test_help_on_a_terminal_without_unicode() -> None:
    done = subprocess.run(
        command("analyze", "--help"),
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Usage: qwen3vl analyze" in done.stdout


def test_escapes_are_those_of_json() -> None:
    codecs.register_error("escapes-of-the-test", json_escapes)
    for text in ("é", "日本語", "😀 mixed é", "plain"):
        written = json.dumps(text, ensure_ascii=False).encode("ascii", "escapes-of-the-test")
        assert json.loads(written) == text
