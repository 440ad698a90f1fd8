"""A row of a batch has the answer, or the error, of a single call over gRPC."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pa = pytest.importorskip("pyarrow", reason="the extra batch is not installed")

from service.batch import engine as batch_engine  # noqa: E402
from service.batch import request as batch_request  # noqa: E402
from service.batch.actors import Answers  # noqa: E402
from service.batch.engine import BatchEngine, Row, Work  # noqa: E402
from service.batch.errors import BatchError  # noqa: E402
from service.batch.request import read_request, record_of, work_of  # noqa: E402
from service.batch.sources import InputOptions, list_input  # noqa: E402
from service.engines.fake import FakeEngine  # noqa: E402
from service.engines.reference import ReferenceEngine  # noqa: E402
from service.errors import EngineUnavailable, Overloaded  # noqa: E402
from service.pb.qwen3vl.v1 import vision_pb2 as pb  # noqa: E402
from service.schema_compiler.api import Options  # noqa: E402
from service.schema_compiler.report import Enforcement  # noqa: E402
from service.schema_compiler.stages import STAGES  # noqa: E402
from service.settings import UNSERVED, Settings, load_settings  # noqa: E402
from service.types import Capabilities, GenerateRequest  # noqa: E402
from service.wiring import BUNDLED_MODEL  # noqa: E402
from tests.service.batch.inputs import damaged, drawing, write_parquet  # noqa: E402
from tests.service.harness import failure, running  # noqa: E402

pytestmark = pytest.mark.slow
SCHEMA = '{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"]}'


def settings_of(**given: Any) -> Settings:
    return load_settings(**UNSERVED, **{"engine": "fake", **given})


def work(settings: Settings, **given: Any) -> Work:
    options = {"task": None, "prompt": None, "schema": None, "sampling": {}}
    return work_of(read_request(**{**options, **given}), settings)


@contextmanager
def started(settings: Settings) -> Iterator[BatchEngine]:
    engine = BatchEngine(settings, lambda note: None)
    try:
        yield engine
    finally:
        engine.close()


def given(*images: bytes) -> list[Callable[[], bytes]]:
    return [partial(bytes, image) for image in images]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The engine inside of a batch."""
    engine = FakeEngine()
    monkeypatch.setattr(batch_engine, "build_engines", lambda *_: [engine])
    return engine


async def single(images: Sequence[bytes], engine: Any, **settings: Any) -> list[dict[str, Any]]:
    """The JSON, or the reason and the message, of a single call for each image."""
    found: list[dict[str, Any]] = []
    async with running(engine, **settings) as server:
        for data in images:
            request = pb.RunTaskRequest(
                task=pb.Task(name="image-analysis"), images=[pb.Image(data=data)]
            )
            call = server.stub.RunTask(request)
            try:
                found.append({"json": (await call).result.json})
            except Exception:
                error = await failure(call)
                found.append({"error_reason": error.reason, "error_message": error.message})
    return found


def test_answers_and_errors_are_those_of_single_calls() -> None:
    """On the bundled model, with images that differ in their answers and every kind of damage."""
    settings = settings_of(engine="reference", threads=1, max_image_pixels=100_000)
    images = [drawing(number) for number in range(6)]
    images[2:2] = [*damaged().values(), drawing(9, (400, 300))]
    engine = ReferenceEngine(BUNDLED_MODEL, threads=1)
    expected = asyncio.run(single(images, engine, max_image_pixels=100_000))
    with started(settings) as batch:
        rows = batch.rows(work(settings, task="image-analysis"), [given(one) for one in images])
    shown = ("json", "error_reason", "error_message")
    found = [{name: row[name] for name in shown if row.get(name)} for row in rows]
    assert found == expected
    reasons = [one["error_reason"] for one in expected if "error_reason" in one]
    assert reasons == [*damaged(), "IMAGE_TOO_MANY_PIXELS"]
    for row in rows:
        if "json" in row:
            document = json.loads(row["json"])
            assert {name: row[name] for name in document} == document
            assert row["prompt_tokens"] > row["image_tokens"] > 0
            assert row["output_tokens"] > 10
            assert row["attempts"] == 1


def test_a_shard_keeps_the_order_of_its_rows(fake: FakeEngine, tmp_path: Path) -> None:
    fake.answer = lambda request: json.dumps({"n": sum(one.width for one in request.images)})
    fake.token_delay_s = 0.001
    settings = settings_of(max_concurrent=3)
    images = [drawing(number, (32 + number, 32)) for number in range(20)]
    images[7] = b""
    write_parquet(tmp_path / "in.parquet", images)
    (piece,) = list_input(InputOptions(str(tmp_path)), 100).pieces
    counted: list[Row] = []
    with started(settings) as batch:
        table = batch.shard(work(settings, prompt="?", schema=SCHEMA), piece, counted.append)
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == list(range(20))
    widths = [row["json"] and json.loads(row["json"])["n"] for row in rows]
    assert widths == [None if number == 7 else 32 + number for number in range(20)]
    assert [row["id"] for row in rows if row["error_reason"] == "IMAGE_EMPTY"] == [7]
    assert len(counted) == 20


def test_text_without_a_schema(fake: FakeEngine) -> None:
    fake.answer = "a red circle"
    settings = settings_of()
    with started(settings) as batch:
        (row,) = batch.rows(work(settings, prompt="What is it?"), [given(drawing(0))])
    assert row["text"] == "a red circle"
    assert "json" not in row


def test_several_images_of_a_row(fake: FakeEngine) -> None:
    fake.answer = lambda request: str(len(request.all_images))
    settings = settings_of(max_images=3)
    with started(settings) as batch:
        rows = batch.rows(
            work(settings, prompt="?"),
            [given(*[drawing(0)] * number) for number in (1, 3, 4)],
        )
    assert [row.get("text") or row["error_reason"] for row in rows] == ["1", "3", "TOO_MANY_IMAGES"]


def test_the_image_of_a_row_comes_after_those_of_examples(fake: FakeEngine) -> None:
    """The same request that `qwen3vl run --examples` sends."""
    seen: list[list[int]] = []

    def answer(request: GenerateRequest) -> str:
        seen.append([image.width for image in request.all_images])
        return "x"

    fake.answer = answer
    settings = settings_of()
    example = pb.Message(
        role=pb.ROLE_USER, parts=[pb.Part(image=pb.Image(data=drawing(0, (40, 40))))]
    )
    said = pb.Message(role=pb.ROLE_ASSISTANT, parts=[pb.Part(text="a")])
    question = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="and this?")])
    inline = pb.InlineTask(messages=[example, said, question])
    chosen = work_of(pb.RunTaskRequest(task=pb.Task(inline=inline)), settings)
    with started(settings) as batch:
        rows = batch.rows(chosen, [given(drawing(1, (50, 50))), given(drawing(1, (60, 60)))])
        (refused,) = batch.rows(chosen, [given(b"x")])
    assert [row["text"] for row in rows] == ["x", "x"]
    assert sorted(seen[-2:]) == [[40, 50], [40, 60]]
    assert refused["error_message"].startswith("task.inline.messages[2].parts[0].image.data: ")


class Unsteady(FakeEngine):
    """Cannot be used for some requests, then works."""

    failures: list[Exception]

    async def generate(self, request: GenerateRequest) -> Any:
        if request.images and self.failures:
            raise self.failures.pop()
        async for chunk in super().generate(request):
            yield chunk


@pytest.mark.parametrize("times", [batch_engine.TRIES - 2, 20])
def test_an_engine_that_cannot_be_used_is_no_error_of_a_row(
    monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(batch_engine, "RETRY_S", 0.01)
    engine = Unsteady("x")
    engine.failures = [
        *[EngineUnavailable("not now") for _ in range(times)],
        Overloaded("full", retry_after_s=1),
    ]
    monkeypatch.setattr(batch_engine, "build_engines", lambda *_: [engine])
    settings = settings_of()
    with started(settings) as batch:
        if times < batch_engine.TRIES:
            (row,) = batch.rows(work(settings, prompt="?"), [given(drawing(0))])
            assert row["text"] == "x"
        else:
            with pytest.raises(BatchError, match="ENGINE_UNAVAILABLE: not now"):
                batch.rows(work(settings, prompt="?"), [given(drawing(0))])


def test_an_error_of_every_row_ends_the_run(fake: FakeEngine) -> None:
    fake.sampling_options = frozenset()
    settings = settings_of()
    with started(settings) as batch, pytest.raises(BatchError, match="SAMPLING_OPTION_INVALID"):
        batch.rows(work(settings, prompt="?", sampling={"top_p": 0.5}), [given(drawing(0))])


def test_a_defect_is_an_error_of_its_row(fake: FakeEngine) -> None:
    fake.crash_after = 0
    settings = settings_of()
    chosen = work(settings, prompt="?")
    fake.crash_after = None
    with started(settings) as batch:
        fake.crash_after = 0
        (row,) = batch.rows(chosen, [given(drawing(0))])
    assert row["error_reason"] == "INTERNAL"
    assert "RuntimeError" not in row["error_message"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"task": "nothing"}, "UNKNOWN_TASK"),
        ({"prompt": "?", "schema": "{"}, "SCHEMA_NOT_JSON"),
        ({"prompt": "?", "schema": '{"type": "no"}'}, "SCHEMA_INVALID"),
        ({"prompt": " "}, "TEXT_EMPTY"),
        ({"prompt": "?", "sampling": {"top_p": 2}}, "SAMPLING_OPTION_INVALID"),
        ({"prompt": "?", "sampling": {"no": 2}}, "no"),
        ({"prompt": "?", "task": "image-analysis"}, "either"),
        ({"task": "image-analysis", "schema": "{}"}, "its own schema"),
    ],
)
def test_a_request_that_fails_for_every_image_is_refused_first(
    options: dict[str, Any], text: str
) -> None:
    with pytest.raises(BatchError, match=text):
        work(settings_of(), **options)


def test_the_record_tells_requests_apart() -> None:
    settings = settings_of()
    asked = work(settings, prompt="a", schema=SCHEMA)
    first = record_of(asked, settings)
    grammar = pb.Grammar(json_schema=SCHEMA)
    shown = pb.InlineTask(user="a", grammar=grammar, schema_in_prompt=True)
    assert record_of(work(settings, prompt="a", schema=SCHEMA), settings) == first
    json.dumps(first)
    others = [
        record_of(work(settings, prompt="b", schema=SCHEMA), settings),
        record_of(work(settings, prompt="a"), settings),
        record_of(work(settings, prompt="a", schema=SCHEMA, sampling={"seed": 1}), settings),
        record_of(work(settings, prompt="a", schema=SCHEMA), settings_of(max_image_pixels=99)),
        record_of(work(settings, prompt="a", schema=SCHEMA), settings_of(engine="reference")),
        record_of(work_of(pb.RunTaskRequest(task=pb.Task(inline=shown)), settings), settings),
        record_of(replace(asked, call=replace(asked.call, accept_empty=True)), settings),
    ]
    assert all(other != first for other in others)
    faster = settings_of(max_concurrent=3)
    assert record_of(work(faster, prompt="a", schema=SCHEMA), faster) == first


def test_a_function_for_pipelines() -> None:
    answers = Answers(prompt="?", schema=SCHEMA, settings={"engine": "fake"})
    table = answers(pa.table({"id": [1, 2], "image": [drawing(0), b"x"]}))
    assert table.column_names[:2] == ["id", "json"]
    assert table.column("error_reason").to_pylist() == [None, "IMAGE_FORMAT_UNSUPPORTED"]
    answers.close()


class Limiting(FakeEngine):
    """Declares that its masks keep lengths of strings, as the engines with weights do."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, limits_lengths=True)


async def test_a_plan_a_server_and_the_command_line_agree_on_lengths() -> None:
    schema = '{"type":"object","properties":{"n":{"maxLength":200}},"additionalProperties":false}'
    settings = settings_of()
    asked = await asyncio.to_thread(work, settings, prompt="Read it.", schema=schema)
    planned = await batch_request._task(asked.call, settings)
    assert planned.report is not None
    assert planned.report.enforcement is Enforcement.ENFORCED
    assert next(iter(STAGES["report"](schema, Options(lengths_beside=True)))) == "ENFORCED"
    async with running(Limiting()) as server:
        request = pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema=schema))
        found = await server.stub.ValidateSchema(request)
    assert found.enforcement == pb.ENFORCEMENT_ENFORCED
