"""Questions about drawings for inline tasks, each with paraphrases and the schema of its answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from examples.drawings.analysis import dumps, phrase
from examples.drawings.scenes import (
    COLORS,
    LIGHTING,
    MAX_OBJECTS,
    POSITIONS,
    SCENES,
    SHAPES,
    SIZES,
    Keyframes,
    Scene,
    Thing,
)

Schema = dict[str, Any]
Answered = tuple[dict[str, str], Any]
"""Words for the blanks of the prompt, and the answer."""


@dataclass(frozen=True)
class Question:
    """A kind of question: `prompts` say the same thing, with blanks such as `{color}`."""

    name: str
    prompts: tuple[str, ...]
    schema: Schema | None
    """JSON schema of the answer; None where the answer is one of `choices` as plain text."""
    answer: Callable[[Any, random.Random], Answered]
    choices: tuple[str, ...] = ()
    images: int = 1


@dataclass(frozen=True)
class Asked:
    """One question as put to the model, and the text of the right answer."""

    question: Question
    prompt: str
    answer: str


def ask(question: Question, facts: Any, rng: random.Random) -> Asked:
    """Put the question about `facts` (see `Question.answer`) in one of its wordings."""
    blanks, answer = question.answer(facts, rng)
    prompt = rng.choice(question.prompts).format(**blanks)
    return Asked(question, prompt, answer if question.schema is None else dumps(answer))


def _object(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _one_of(words: Any, *more: str) -> Schema:
    return {"type": "string", "enum": [*words, *more]}


def _list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_OBJECTS}


COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_OBJECTS}
PLACE = {"position": _one_of(POSITIONS)}
LOOK = {"shape": _one_of(SHAPES), "color": _one_of(COLORS), "size": _one_of(SIZES)}


def _count(facts: Scene, rng: random.Random) -> Answered:
    return {}, {"count": len(facts.objects)}


def _seen_or_any(seen: list[str], words: Any, rng: random.Random) -> str:
    return rng.choice(seen) if rng.random() < 0.6 else rng.choice(list(words))


def _count_color(facts: Scene, rng: random.Random) -> Answered:
    color = _seen_or_any([thing.color for thing in facts.objects], COLORS, rng)
    return {"color": color}, {"count": sum(t.color == color for t in facts.objects)}


def _count_shape(facts: Scene, rng: random.Random) -> Answered:
    shape = _seen_or_any([thing.shape for thing in facts.objects], SHAPES, rng)
    return {"shape": shape}, {"count": sum(t.shape == shape for t in facts.objects)}


def _colors(facts: Scene, rng: random.Random) -> Answered:
    present = {thing.color for thing in facts.objects}
    return {}, {"colors": [color for color in COLORS if color in present]}


def _name(facts: Scene, rng: random.Random) -> str:
    """Mostly the name of one object of the image, else of any, which may not be there."""
    names = [thing.name for thing in facts.objects]
    unique = [name for name in names if names.count(name) == 1]
    if unique and rng.random() < 0.75:
        return rng.choice(unique)
    absent = [f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" not in names]
    return rng.choice(absent)


def _position(facts: Scene, rng: random.Random) -> Answered:
    name = _name(facts, rng)
    found = [thing.position for thing in facts.objects if thing.name == name]
    return {"name": name}, {"position": found[0] if found else "none"}


def _present(facts: Scene, rng: random.Random) -> Answered:
    name = _name(facts, rng) if rng.random() < 0.5 else _near_miss(facts, rng)
    return {"name": name}, {"answer": any(thing.name == name for thing in facts.objects)}


def _near_miss(facts: Scene, rng: random.Random) -> str:
    """The shape of one object in any colour, or its colour on any shape."""
    thing = rng.choice(facts.objects)
    if rng.random() < 0.5:
        return f"{rng.choice(list(COLORS))} {thing.shape}"
    return f"{thing.color} {rng.choice(SHAPES)}"


def _record(thing: Thing) -> dict[str, str]:
    return {
        "position": thing.position,
        "shape": thing.shape,
        "color": thing.color,
        "size": thing.size,
    }


def _objects(facts: Scene, rng: random.Random) -> Answered:
    return {}, {"objects": [_record(thing) for thing in facts.objects]}


def _phrases(facts: Scene, rng: random.Random) -> Answered:
    return {}, {"objects": [phrase(thing) for thing in facts.objects]}


def _object_at(facts: Scene, rng: random.Random) -> Answered:
    thing = rng.choice(facts.objects)
    record = _record(thing)
    return {"position": record.pop("position")}, record


def _scene(facts: Scene, rng: random.Random) -> Answered:
    return {}, {"scene": facts.place, "lighting": facts.lighting}


def _day_or_night(facts: Scene, rng: random.Random) -> Answered:
    return {}, facts.lighting


def _place(facts: Scene, rng: random.Random) -> Answered:
    return {}, facts.place


def _counts(facts: tuple[Scene, Scene], rng: random.Random) -> Answered:
    first, second = facts
    return {}, {"first": len(first.objects), "second": len(second.objects)}


def _moved(facts: Keyframes, rng: random.Random) -> Answered:
    return {}, {
        "object": facts.moved.name,
        "from": facts.moved.position,
        "to": POSITIONS[facts.target],
    }


QUESTIONS = (
    Question(
        "count",
        (
            "How many objects are there? Answer as JSON.",
            "Count the objects in the picture.",
            "How many shapes do you see?",
            "Give the number of objects as JSON.",
        ),
        _object(count=COUNT),
        _count,
    ),
    Question(
        "count_color",
        (
            "How many {color} objects are there? Answer as JSON.",
            "Count the {color} objects.",
            "How many objects are {color}?",
        ),
        _object(count=COUNT),
        _count_color,
    ),
    Question(
        "count_shape",
        (
            "How many {shape} shapes are there? Answer as JSON.",
            "Count the objects with the shape {shape}.",
            "How many objects have the shape {shape}?",
        ),
        _object(count=COUNT),
        _count_shape,
    ),
    Question(
        "colors",
        (
            "Which colors do the objects have? Answer as JSON.",
            "List the colors of the objects.",
            "What colors do you see on the objects?",
        ),
        _object(colors=_list_of(_one_of(COLORS))),
        _colors,
    ),
    Question(
        "position",
        (
            "Where is the {name}? Answer as JSON.",
            "Give the position of the {name}, or none.",
            "At which position is the {name}?",
        ),
        _object(position=_one_of(POSITIONS, "none")),
        _position,
    ),
    Question(
        "present",
        (
            "Is there a {name}? Answer as JSON.",
            "Does the picture show a {name}?",
            "Can you see a {name}?",
        ),
        _object(answer={"type": "boolean"}),
        _present,
    ),
    Question(
        "object_at",
        (
            "What is at {position}? Answer as JSON.",
            "Which object is at {position}?",
            "Describe the object at {position}.",
        ),
        _object(**LOOK),
        _object_at,
    ),
    Question(
        "objects",
        (
            "List every object as JSON.",
            "Which objects are where? Give position, shape, color and size of each.",
            "Give all objects with their position, shape, color and size.",
            "Detect all objects.",
        ),
        _object(objects=_list_of(_object(**PLACE, **LOOK))),
        _objects,
    ),
    Question(
        "phrases",
        (
            "Name every object in a few words. Answer as JSON.",
            "List the objects, each as one phrase.",
            "Say in short phrases what is in view.",
        ),
        _object(objects=_list_of({"type": "string"})),
        _phrases,
    ),
    Question(
        "scene",
        (
            "What scene is it and what is the lighting? Answer as JSON.",
            "Give the scene and the lighting.",
            "Classify the scene and the lighting of the picture.",
        ),
        _object(scene=_one_of(SCENES), lighting=_one_of(LIGHTING)),
        _scene,
    ),
    Question(
        "day_or_night",
        (
            "Is it day or night?",
            "Day or night? Answer with one word.",
            "Which time of day is it, day or night?",
        ),
        None,
        _day_or_night,
        choices=tuple(LIGHTING),
    ),
    Question(
        "place",
        (
            "Which place is it: field, desert, snow or sea?",
            "Where is this? Answer with one word.",
            "Name the place in one word.",
        ),
        None,
        _place,
        choices=tuple(SCENES),
    ),
    Question(
        "counts",
        (
            "How many objects are in the first and in the second picture? Answer as JSON.",
            "Count the objects in each of the two pictures.",
        ),
        _object(first=COUNT, second=COUNT),
        _counts,
        images=2,
    ),
    Question(
        "moved",
        (
            "Which object moved between the two pictures? Answer as JSON.",
            "What moved, from where to where?",
        ),
        _object(
            object={"type": "string"},
            **{"from": _one_of(POSITIONS), "to": _one_of(POSITIONS)},
        ),
        _moved,
        images=2,
    ),
)
"""All kinds of questions. The facts that an answer needs: a Scene for one image; for two, a pair
of scenes ("counts") or Keyframes ("moved")."""

BY_NAME = {question.name: question for question in QUESTIONS}
