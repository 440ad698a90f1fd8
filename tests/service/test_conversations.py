"""Conversations through a real server: what reaches the engine, and what is refused by field."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import grpc
import pytest

from service.client import read_error
from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.settings import load_settings
from service.tasks.registry import TaskSourceError
from service.types import GenerateRequest, ImagePart, Message, Role, TextPart, ToolCall
from service.wiring import build_registry
from tests.service.cli.terminal import qwen3vl
from tests.service.harness import image_bytes, running

IMAGE = pb.Image(data=image_bytes(64, 48), max_pixels=10_000)
TOOL = pb.ToolDefinition(name="zoom", description="Looks closer.", parameters_json='{"a": 1.50}')
CALL = pb.ToolCall(name="zoom", arguments_json='{"x": 1.50}')


def text(role: pb.Role.ValueType, *texts: str) -> pb.Message:
    return pb.Message(role=role, parts=[pb.Part(text=one) for one in texts])


def user(*parts: str | pb.Image) -> pb.Message:
    made = [pb.Part(text=one) if isinstance(one, str) else pb.Part(image=one) for one in parts]
    return pb.Message(role=pb.ROLE_USER, parts=made)


def request(*messages: pb.Message, **inline: Any) -> pb.RunTaskRequest:
    return pb.RunTaskRequest(task=pb.Task(inline=pb.InlineTask(messages=messages, **inline)))


async def test_a_conversation_reaches_the_engine_as_it_was_sent() -> None:
    seen: list[GenerateRequest] = []

    def remember(asked: GenerateRequest) -> str:
        seen.append(asked)
        return "fine"

    sent = request(
        text(pb.ROLE_SYSTEM, "Be brief."),
        user("Look: ", IMAGE, " and ", IMAGE, "?"),
        pb.Message(role=pb.ROLE_ASSISTANT, parts=[pb.Part(text="Closer.")], tool_calls=[CALL]),
        pb.Message(role=pb.ROLE_TOOL, parts=[pb.Part(image=IMAGE)]),
        tools=[TOOL],
    )
    async with running(FakeEngine(remember)) as started:
        answer = await started.stub.RunTask(sent, timeout=60)
        events = [one async for one in started.stub.StreamTask(
            pb.StreamTaskRequest(task=sent.task), timeout=60)]  # fmt: skip
    assert answer.result.text == events[-1].result.text == "fine"
    del seen[0]  # the warm-up
    system, asked, called, tool = seen[0].conversation
    assert (system.role, system.parts) == (Role.SYSTEM, (TextPart("Be brief."),))
    assert shape(asked) == ["Look: ", 0, " and ", 0, "?"]
    assert (called.role, called.tool_calls) == (Role.ASSISTANT, (ToolCall("zoom", '{"x": 1.50}'),))
    assert (tool.role, shape(tool)) == (Role.TOOL, [0])
    assert [(one.width, one.max_pixels) for one in seen[0].all_images] == [(64, 10_000)] * 3
    assert [(one.name, one.description, one.parameters) for one in seen[0].tools] == [
        ("zoom", "Looks closer.", '{"a": 1.50}')
    ]


def shape(message: Message) -> list[str | int]:
    """The texts of a message, and 0 for each image."""
    return [0 if isinstance(part, ImagePart) else part.text for part in message.parts]


@pytest.mark.slow
async def test_the_short_form_and_its_conversation_give_the_same_answer() -> None:
    """On the bundled model, which sees the image."""
    from service.engines.reference import ReferenceEngine
    from service.wiring import BUNDLED_MODEL

    engine: Any = ReferenceEngine(BUNDLED_MODEL)
    grammar = pb.Grammar(choice=pb.Choice(options=["day", "night"]))
    question = "Is it day or night?"
    short = pb.RunTaskRequest(
        task=pb.Task(inline=pb.InlineTask(system="S", user=question, grammar=grammar)),
        images=[IMAGE],
    )
    whole = request(text(pb.ROLE_SYSTEM, "S"), user(IMAGE, question), grammar=grammar)
    async with running(engine) as started:
        one = await started.stub.RunTask(short, timeout=30)
        other = await started.stub.RunTask(whole, timeout=30)
    assert one.result.text == other.result.text
    assert one.result.usage == other.result.usage


NAMELESS = pb.ToolCall(name="a b", arguments_json="{}")
BROKEN = pb.Image(data=b"GIF89a")
REFUSED: list[tuple[Any, str, str]] = [
    (request(user("Hi"), user="Hi"), "task.inline.user", "must be empty beside"),
    (request(user("Hi"), system="Hi"), "task.inline.system", "must be empty beside"),
    (request(pb.Message(parts=[pb.Part(text="Hi")])), "task.inline.messages[0].role", "one of ROLE_"),
    (request(user("Hi"), text(pb.ROLE_SYSTEM, "S")), "task.inline.messages[1].role", "only the first"),
    (request(user("Hi"), text(pb.ROLE_ASSISTANT, "A")), "task.inline.messages[1].role", "the last"),
    (request(pb.Message(role=pb.ROLE_USER)), "task.inline.messages[0].parts", "is empty"),
    (request(user("a"), pb.Message(role=pb.ROLE_USER, parts=[pb.Part()])),
     "task.inline.messages[1].parts[0]", "is empty"),
    (request(pb.Message(role=pb.ROLE_SYSTEM, parts=[pb.Part(image=IMAGE)]), user("a")),
     "task.inline.messages[0].parts[0].image", "only messages of users and tools"),
    (request(pb.Message(role=pb.ROLE_USER, tool_calls=[CALL])),
     "task.inline.messages[0].tool_calls", "only ROLE_ASSISTANT"),
    (request(pb.Message(role=pb.ROLE_ASSISTANT, tool_calls=[NAMELESS]), user("a")),
     "task.inline.messages[0].tool_calls[0].name", "1 to 64 letters"),
    (request(pb.Message(role=pb.ROLE_ASSISTANT, tool_calls=[pb.ToolCall(name="f", arguments_json="[")]),
             user("a")), "task.inline.messages[0].tool_calls[0].arguments_json", "is not JSON"),
    (request(user("a"), tools=[pb.ToolDefinition(name="f", parameters_json="[]")]),
     "task.inline.tools[0].parameters_json", "must be a JSON object"),
    (request(user("a"), tools=[TOOL, TOOL]), "task.inline.tools[1].name", "defined twice"),
    (request(user("a", BROKEN)), "task.inline.messages[0].parts[1].image.data", "GIF"),
    (request(user(pb.Image())), "task.inline.messages[0].parts[0].image.data", "has no bytes"),
    (request(*[user("a")] * 1025), "task.inline.messages", "at most 1024"),
    (request(user("a"), tools=[TOOL] * 129), "task.inline.tools", "at most 128"),
    (request(user(*[IMAGE] * 4)), "task.inline.messages", "has 4 images, at most 3"),
    (request(user("a" * 60), text(pb.ROLE_USER, "b" * 60)), "task.inline.messages", "have 120 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "field", "says"), REFUSED, ids=[one[1] for one in REFUSED])
async def test_a_conversation_that_is_wrong_is_refused_by_field(
    sent: pb.RunTaskRequest, field: str, says: str
) -> None:
    async with running(max_images=3, max_text_bytes=110) as started:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await started.stub.RunTask(sent, timeout=60)
    error = read_error(caught.value)
    assert error.field_violations[0][0] == field
    assert says in error.field_violations[0][1]


async def test_images_of_the_request_beside_messages_are_refused() -> None:
    sent = request(user("Hi"))
    sent.images.append(IMAGE)
    async with running() as started:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await started.stub.RunTask(sent, timeout=60)
    assert read_error(caught.value).field_violations[0][0] == "images"


async def test_as_many_images_and_messages_as_are_allowed() -> None:
    async with running(max_images=3) as started:
        await started.stub.RunTask(request(user(IMAGE, IMAGE), user(IMAGE)), timeout=60)
        await started.stub.RunTask(request(*[user("a")] * 1024), timeout=60)


# Examples of task files and of the command line

EXAMPLES = """
- user: Which shape?
  images: [one.png]
  assistant: circle
- user: Which shape now?
  assistant: none
"""


def write_task(folder: Path, examples: str) -> None:
    (folder / "one.png").write_bytes(image_bytes(40, 30, "PNG"))
    indented = examples.replace("\n", "\n  ")
    (folder / "shapes.yaml").write_text(
        f"description: Names shapes.\nsystem: One word.\nuser: And this?\nexamples:{indented}\n"
    )


def remembering(seen: list[GenerateRequest]) -> FakeEngine:
    def answer(asked: GenerateRequest) -> str:
        seen.append(asked)
        return "square"

    return FakeEngine(answer)


def spoken(request: GenerateRequest) -> list[tuple[str, list[str | int]]]:
    return [(one.role.value, shape(one)) for one in request.conversation]


FEW_SHOT = [
    ("system", ["One word."]),
    ("user", [0, "Which shape?"]),
    ("assistant", ["circle"]),
    ("user", ["Which shape now?"]),
    ("assistant", ["none"]),
    ("user", [0, 0, "And this?"]),
]


async def test_examples_of_a_task_file_come_before_the_question(tmp_path: Path) -> None:
    write_task(tmp_path, EXAMPLES)
    seen: list[GenerateRequest] = []
    sent = pb.RunTaskRequest(task=pb.Task(name="shapes"), images=[IMAGE, IMAGE])
    async with running(remembering(seen), tasks_dir=tmp_path) as started:
        for _ in range(2):  # the images of the examples are there for the next call, too
            await started.stub.RunTask(sent, timeout=60)
    assert [spoken(one) for one in seen[1:]] == [FEW_SHOT, FEW_SHOT]
    assert [one.width for one in seen[2].all_images] == [40, 64, 64]


async def test_examples_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(image_bytes(40, 30, "PNG"))
    (tmp_path / "examples.yaml").write_text(EXAMPLES)
    image = tmp_path / "asked.png"
    image.write_bytes(image_bytes(64, 48, "PNG"))
    seen: list[GenerateRequest] = []
    async with running(remembering(seen)) as started:
        done = await asyncio.to_thread(
            qwen3vl, "run", "--server", started.address, "--system", "One word.",
            "--prompt", "And this?", "--examples", tmp_path / "examples.yaml", image, image,
        )  # fmt: skip
    assert (done.code, done.out) == (0, "square\n"), done.err
    assert spoken(seen[1]) == FEW_SHOT


@pytest.mark.parametrize(
    ("examples", "says"),
    [
        ("- user: a", "--examples: 0.assistant: Field required"),
        ("- {user: a, assistant: b}\n- {assistant: ' '}", "--examples: 1.assistant: "),
        ("user: a", "--examples: examples.yaml: Input should be a valid list"),
        ("- [", "--examples: is not YAML"),
        ("- {images: [no.png], assistant: b}", "--examples: examples[0].images[0]: there is no"),
    ],
)
async def test_examples_of_the_command_line_that_are_wrong(
    tmp_path: Path, examples: str, says: str
) -> None:
    (tmp_path / "examples.yaml").write_text(examples)
    done = await asyncio.to_thread(
        qwen3vl, "run", "--server", "127.0.0.1:1", "--prompt", "x",
        "--examples", tmp_path / "examples.yaml",
    )  # fmt: skip
    assert (done.code, done.out) == (2, "")
    assert says in " ".join(re.sub("[│╭╮╰╯─]", " ", done.err).split())


def test_the_images_of_examples_have_a_limit_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = image_bytes(40, 30, "PNG")
    write_task(tmp_path, EXAMPLES)
    settings = load_settings(tasks_dir=tmp_path)
    monkeypatch.setattr("service.tasks.examples.MAX_EXAMPLE_BYTES", len(image))
    assert build_registry(settings).get("shapes").example_images[0].data == image
    monkeypatch.setattr("service.tasks.examples.MAX_EXAMPLE_BYTES", len(image) - 1)
    with pytest.raises(TaskSourceError, match=f"have more than {len(image) - 1} bytes of images"):
        build_registry(settings)


@pytest.mark.parametrize(
    ("examples", "says"),
    [
        ("\n- user: a", "examples[0].assistant: is missing; it must be text that is not blank"),
        ("\n- {user: a, assistant: 3}", "examples[0].assistant: must be text that is not blank"),
        ("\n- {user: a, assitant: b}", "examples[0].assitant: is not a key of an example; did you"),
        ("\n- {images: [no.png], assistant: b}", "examples[0].images[0]: there is no file no.png"),
        ("\n- {images: [shapes.yaml], assistant: b}", "examples[0].images[0]: "),
        (" text", "examples: must be a list of at most 64 examples"),
    ],
)
def test_examples_that_are_wrong_stop_the_start(tmp_path: Path, examples: str, says: str) -> None:
    write_task(tmp_path, examples)
    with pytest.raises(TaskSourceError) as caught:
        build_registry(load_settings(tasks_dir=tmp_path))
    assert f": {says}" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
