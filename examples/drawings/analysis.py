"""The ImageAnalysis answer to a drawing, computed from its facts."""

from __future__ import annotations

import json
from typing import Any

from examples.drawings.scenes import COLORS, POSITIONS, SHAPES, SIZES, Keyframes, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")
WHERE = {
    "field": "in a field",
    "desert": "in a desert",
    "snow": "in the snow",
    "sea": "at sea",
}
WHEN = {"day": "by day", "night": "at night"}
LIGHT_TERM = {"day": "daylight", "night": "night"}
MIN_TAGS, MAX_TAGS = 8, 12


def dumps(value: Any) -> str:
    """JSON text exactly as the model writes it."""
    return json.dumps(value, ensure_ascii=False)


def analysis(facts: Scene | Keyframes) -> dict[str, Any]:
    """The nine ImageAnalysis fields in order; of keyframes, those of the first and the move."""
    first = facts.first if isinstance(facts, Keyframes) else facts
    return {
        "scene": first.place,
        "description": description(first),
        "subjects": [],
        "objects": [phrase(thing) for thing in first.objects],
        "actions": [move(facts)] if isinstance(facts, Keyframes) else [],
        "mood": [mood(first)],
        "shot_type": "wide shot",
        "lighting": [LIGHT_TERM[first.lighting]],
        "tags": tags(first),
    }


def phrase(thing: Thing) -> str:
    """All four attributes of an object."""
    return f"{thing.size} {thing.name} at {thing.position}"


def move(facts: Keyframes) -> str:
    return f"{facts.moved.name} moves to {POSITIONS[facts.target]}"


def mood(facts: Scene) -> str:
    """Few objects make a calm image, many a lively one; at night both are stranger."""
    few = len(facts.objects) <= 2
    if facts.lighting == "day":
        return "calm" if few else "lively"
    return "quiet" if few else "mysterious"


def description(facts: Scene) -> str:
    """One sentence that names every object, the scene and the time of day."""
    names = [f"a {thing.size} {thing.name}" for thing in facts.objects]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed.capitalize()} {WHERE[facts.place]} {WHEN[facts.lighting]}."


def tags(facts: Scene) -> list[str]:
    """Eight to twelve tags: sizes and positions only fill up to eight."""
    things = facts.objects
    count = f"{NUMBERS[len(things)]} object{'s' if len(things) > 1 else ''}"
    chosen = ["drawing", facts.place, LIGHT_TERM[facts.lighting], count]
    chosen += [shape for shape in SHAPES if any(t.shape == shape for t in things)]
    chosen += [color for color in COLORS if any(t.color == color for t in things)]
    extra = [size for size in SIZES if any(t.size == size for t in things)]
    extra += [thing.position for thing in things]
    return chosen + extra[: max(0, MIN_TAGS - len(chosen))]
