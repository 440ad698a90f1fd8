"""Model families: Thinking editions, and a family that no code knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lmdeploy_ext import families
from lmdeploy_ext.families import QWEN3_VL, ModelFamily
from service.engines.common.chat import Chat
from service.engines.common.config import CheckpointError, TextConfig
from service.engines.common.detokenizer import Detokenizer
from service.engines.reference import ReferenceEngine
from service.types import GenerateRequest, Message, Role, Sampling, TextPart
from service.wiring import BUNDLED_MODEL
from tests.checkpoints import TEMPLATE, write_checkpoint

OPENED = TEMPLATE.replace("assistant\\n'", "assistant\\n<think>\\n'")
QUESTION = [Message(Role.USER, (TextPart("Hi"),))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


def edition(folder: Path, where: Path, template: str, place: str) -> Path:
    """A copy of a checkpoint whose chat template stands in the given file."""
    shutil.copytree(folder, where)
    settings = json.loads((where / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    if place == "tokenizer_config.json":
        settings["chat_template"] = template
    elif place == "chat_template.json":
        (where / place).write_text(json.dumps({"chat_template": template}))
    else:
        (where / place).write_text(template)
    (where / "tokenizer_config.json").write_text(json.dumps(settings))
    return where


def tail(folder: Path, *, constrained: bool) -> str:
    """The end of the prompt, behind the last special token."""
    chat = Chat(folder, TextConfig.from_checkpoint(folder))
    ids = chat.pack(chat.turns(QUESTION, constrained=constrained), ()).token_ids.tolist()
    last = max(index for index, one in enumerate(ids) if one in chat.special_ids)
    return b"".join(chat.table[one] for one in ids[last + 1 :]).decode()


@pytest.mark.parametrize(
    "place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"]
)
def test_a_thinking_edition_thinks_but_not_under_a_grammar(
    tiny: Path, tmp_path: Path, place: str
) -> None:
    folder = edition(tiny, tmp_path / "thinking", OPENED, place)
    assert tail(folder, constrained=False) == "assistant\n<think>\n"
    assert tail(folder, constrained=True) == "assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize("step", [1, 2, 3, 5, 100])
def test_thoughts_are_not_part_of_the_answer(step: int) -> None:
    whole = "I </thin see: < é\n</think>\n\nA cat.\n</think> is text here\n".encode()
    pieces = [whole[start : start + step] for start in range(0, len(whole), step)]
    detokenizer = Detokenizer(pieces, thinks=True)
    text = "".join(detokenizer.feed(one) for one in range(len(pieces))) + detokenizer.finish()
    assert text == "A cat.\n</think> is text here\n"


def test_an_answer_cut_in_its_thoughts_is_empty() -> None:
    detokenizer = Detokenizer([b"Let me see", "é".encode()[:1]], thinks=True)
    assert detokenizer.feed(0) + detokenizer.feed(1) + detokenizer.finish() == ""


async def test_the_engine_leaves_thoughts_out(tiny: Path, tmp_path: Path) -> None:
    """Random weights never end their thoughts, so nothing is said, and all tokens are counted."""
    folder = edition(tiny, tmp_path / "thinking", OPENED, "chat_template.jinja")
    engine = ReferenceEngine(folder, dtype="float32", device="cpu")
    await engine.start()
    try:
        request = GenerateRequest("one", "What is there?", sampling=Sampling(max_tokens=8))
        chunks = [chunk async for chunk in engine.generate(request)]
    finally:
        await engine.close()
    assert "".join(chunk.text for chunk in chunks) == ""
    assert chunks[-1].usage.output_tokens > 0


def test_an_instruct_edition_does_not_think(tiny: Path, tmp_path: Path) -> None:
    mentions = "{#- earlier answers: <think>…</think> #}" + TEMPLATE
    folder = edition(tiny, tmp_path / "instruct", mentions, "chat_template.jinja")
    assert tail(folder, constrained=False) == "assistant\n"
    assert tail(folder, constrained=True) == "assistant\n"
    bundled = TextConfig.from_checkpoint(BUNDLED_MODEL)
    assert bundled.family is QWEN3_VL
    assert not bundled.thinking


def test_an_unknown_architecture_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    folder = renamed(tiny, tmp_path / "unknown", "MadeUpForConditionalGeneration")
    with pytest.raises(CheckpointError, match="is MadeUpForConditionalGeneration; supported are "):
        TextConfig.from_checkpoint(folder)


async def test_a_new_family_is_one_record(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference engine answers as for the family that the made-up one is a copy of."""
    folder = renamed(tiny, tmp_path / "made-up", "MadeUpForConditionalGeneration")
    made_up = ModelFamily("Made up", dense=("MadeUpForConditionalGeneration",))
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, made_up])
    assert TextConfig.from_checkpoint(folder).family is made_up
    assert await answer(folder) == await answer(tiny)


def test_the_fraction_of_mrope_is_that_of_the_family(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = renamed(tiny, tmp_path / "partial", "MadeUpForConditionalGeneration")
    partial = ModelFamily("Partial", ("MadeUpForConditionalGeneration",), rotary_fraction=0.25)
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, partial])
    with pytest.raises(CheckpointError, match=r"mrope_section .* does not sum to"):
        TextConfig.from_checkpoint(folder)


def renamed(folder: Path, where: Path, architecture: str) -> Path:
    shutil.copytree(folder, where)
    config = json.loads((where / "config.json").read_text())
    config["architectures"] = [architecture]
    (where / "config.json").write_text(json.dumps(config))
    return where


async def answer(folder: Path) -> str:
    engine = ReferenceEngine(folder, dtype="float32", device="cpu")
    await engine.start()
    try:
        request = GenerateRequest("one", "What is there?", sampling=Sampling(max_tokens=8))
        return "".join([chunk.text async for chunk in engine.generate(request)])
    finally:
        await engine.close()
