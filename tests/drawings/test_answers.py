"""The right answers: they fit their schemas, pass the parser, and survive the tokenizer."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.drawings import tokenizer
from examples.drawings.analysis import MAX_TAGS, MIN_TAGS, analysis, dumps
from examples.drawings.questions import BY_NAME, QUESTIONS, Asked, Question, ask
from examples.drawings.samples import FOLDER, PAIRS, SINGLE
from examples.drawings.scenes import COLORS, HELD_OUT_SEED, SHAPES, Keyframes, keyframes, scene
from service.schema_compiler.frontend.checked_schema import check_json_schema
from service.tasks.image_analysis import PROMPT, document, parse, schema, usable
from service.wiring import BUNDLED_MODEL

SEEDS = st.integers(0, 2 * HELD_OUT_SEED)


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer.load(BUNDLED_MODEL)


def facts_for(question: Question, seed: int) -> Any:
    if question.images == 1:
        return scene(seed)
    return keyframes(seed) if question.name == "moved" else (scene(seed), scene(seed + 1))


def asked(seed: int) -> list[Asked]:
    rng = random.Random(seed)
    return [ask(question, facts_for(question, seed), rng) for question in QUESTIONS]


@given(SEEDS, st.booleans())
def test_the_analysis_passes_the_parser_unchanged(seed: int, pair: bool) -> None:
    facts = keyframes(seed) if pair else scene(seed)
    answer = analysis(facts)
    jsonschema.Draft202012Validator(schema()).validate(answer)
    parsed = parse(dumps(answer))
    assert document(parsed) == answer
    assert usable(parsed)
    assert MIN_TAGS <= len(answer["tags"]) <= MAX_TAGS
    assert bool(answer["actions"]) == isinstance(facts, Keyframes)


@given(SEEDS)
def test_every_answer_fits_its_question(seed: int) -> None:
    for put in asked(seed):
        question = put.question
        assert "{" not in put.prompt
        if question.schema is None:
            assert put.answer in question.choices
        else:
            jsonschema.Draft202012Validator(question.schema).validate(json.loads(put.answer))
            assert put.answer == dumps(json.loads(put.answer))


def test_every_schema_is_admitted() -> None:
    for question in QUESTIONS:
        if question.schema is not None:
            assert check_json_schema(json.dumps(question.schema)) == question.schema


@given(SEEDS)
def test_answers_match_the_facts_of_the_scene(seed: int) -> None:
    facts, rng = scene(seed), random.Random(seed)

    def answer(name: str) -> tuple[str, Any]:
        put = ask(BY_NAME[name], facts, rng)
        return put.prompt, json.loads(put.answer)

    assert answer("count")[1] == {"count": len(facts.objects)}
    assert set(answer("colors")[1]["colors"]) == {thing.color for thing in facts.objects}
    assert [o["position"] for o in answer("objects")[1]["objects"]] == [
        thing.position for thing in facts.objects
    ]
    prompt, reply = answer("count_color")
    color = next(color for color in COLORS if color in prompt)
    assert reply["count"] == sum(thing.color == color for thing in facts.objects)
    prompt, reply = answer("present")
    name = next(name for c in COLORS for s in SHAPES if (name := f"{c} {s}") in prompt)
    assert reply["answer"] == any(thing.name == name for thing in facts.objects)


@settings(max_examples=40)
@given(SEEDS)
def test_the_tokenizer_round_trips_every_answer(words: Any, seed: int) -> None:
    texts = [dumps(analysis(scene(seed))), dumps(analysis(keyframes(seed))), PROMPT]
    texts += [text for put in asked(seed) for text in (put.prompt, put.answer)]
    for text in texts:
        ids = words(text, add_special_tokens=False)["input_ids"]
        assert words.decode(ids, clean_up_tokenization_spaces=False) == text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_the_tokenizer_has_bytes_for_any_text(words: Any, text: str) -> None:
    backend = words.backend_tokenizer
    plain = backend.normalizer.normalize_str(text)
    ids = words(plain, add_special_tokens=False)["input_ids"]
    assert words.decode(ids, clean_up_tokenization_spaces=False) == plain


def test_answers_are_short(words: Any) -> None:
    """The budget of a request is 1,024 tokens."""
    lengths = [len(words(dumps(analysis(keyframes(seed))))["input_ids"]) for seed in range(50)]
    assert max(lengths) < 300


def test_the_samples_are_what_their_script_writes() -> None:
    for name, (offset, _) in SINGLE.items():
        expected = analysis(scene(HELD_OUT_SEED + offset))
        assert json.loads((FOLDER / f"{name}.json").read_text()) == expected
    for name, (offset, _) in PAIRS.items():
        expected = analysis(keyframes(HELD_OUT_SEED + offset))
        assert json.loads((FOLDER / f"{name}.json").read_text()) == expected
