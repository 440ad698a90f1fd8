"""The ImageAnalysis task: one image, or keyframes of one scene, in nine typed fields."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import OutputInvalid
from service.schema_compiler import jsontext
from service.structured_output.answers import parse_json
from service.tasks.contract import Task
from service.types import Grammar, GrammarKind, PropertyOrder

FIELDS: dict[str, str] = {
    "scene": "category of the scene, 1-3 words",
    "description": "1-2 sentences; text visible in the picture is quoted first",
    "subjects": "list of who is in view: people, animals, main characters",
    "objects": "list of what is in view",
    "actions": "list of what happens",
    "mood": "list of emotional tones",
    "shot_type": "one camera-shot label",
    "lighting": "list of lighting terms",
    "tags": "list of 8-12 search tags",
}
"""Name and meaning of each field, in the order in which the model writes them."""

STRING_FIELDS = ("scene", "description", "shot_type")

PROMPT = (
    "The images are keyframes of one scene in chronological order. "
    "Answer with only one JSON object that has exactly these fields:\n"
    + "".join(f"{name}: {meaning}\n" for name, meaning in FIELDS.items())
    + "State only what the picture supports. Prefer the concrete to the speculative. "
    "Repeat nothing. Leave a string or list empty where unknown. No markdown."
)


def schema() -> dict[str, Any]:
    """JSON schema of the answer: the nine properties, all required, no others, no enums."""
    strings = {"type": "array", "items": {"type": "string"}}
    return {
        "type": "object",
        "properties": {
            name: {"type": "string"} if name in STRING_FIELDS else dict(strings) for name in FIELDS
        },
        "required": list(FIELDS),
        "additionalProperties": False,
    }


@dataclass(frozen=True, slots=True)
class ImageAnalysis:
    """The analysis of an image. An empty field means that nothing was found."""

    scene: str = ""
    description: str = ""
    subjects: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    mood: tuple[str, ...] = ()
    shot_type: str = ""
    lighting: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def parse(text: str) -> ImageAnalysis:
    """Parse an answer: corrects harmless deviations, rejects wrong data.

    Raises ``OutputInvalid``, whose metadata name the invalid fields.
    """
    answer = parse_json(text.strip())
    if not isinstance(answer, dict):
        raise _invalid("is not a JSON object", keyword="type")
    missing = [name for name in FIELDS if answer.get(name) is None]
    if missing:
        raise _invalid("lacks fields", missing, keyword="required")
    unknown = [name for name in answer if name not in FIELDS]
    if unknown:
        raise _invalid("has unknown fields", unknown, keyword="additionalProperties")
    values: dict[str, Any] = {
        name: _string(name, answer[name]) if name in STRING_FIELDS else _strings(name, answer[name])
        for name in FIELDS
    }
    return ImageAnalysis(**values)


def usable(analysis: ImageAnalysis) -> bool:
    """Whether the answer says enough to be indexed."""
    described = bool(analysis.description and analysis.tags)
    return described or bool(analysis.subjects or analysis.objects or analysis.actions)


def document(analysis: ImageAnalysis) -> dict[str, Any]:
    """The analysis as a JSON value that is valid against ``schema()``, in the order of
    ``FIELDS``."""
    return {
        name: value if isinstance(value, str) else list(value)
        for name, value in ((name, getattr(analysis, name)) for name in FIELDS)
    }


def _string(name: str, value: Any) -> str:
    """A string; ``shot_type`` may also be a list with at most one non-empty item."""
    if isinstance(value, str):
        return value.strip()
    if name == "shot_type" and isinstance(value, list):
        labels = [item.strip() for item in _only_strings(name, value) if item.strip()]
        if len(labels) > 1:
            raise _invalid("has more than one label in", [name], keyword="maxItems")
        return labels[0] if labels else ""
    raise _invalid("has a value of the wrong type in", [name], keyword="type")


def _strings(name: str, value: Any) -> tuple[str, ...]:
    """A list of strings in order, trimmed, without empty strings and exact duplicates.

    A single string becomes one label; only ``tags`` are split, at comma, semicolon and newline.
    Items of a list are never split.
    """
    if isinstance(value, str):
        items = re.split(r"[,;\n]", value) if name == "tags" else [value]
    elif isinstance(value, list):
        items = _only_strings(name, value)
    else:
        raise _invalid("has a value of the wrong type in", [name], keyword="type")
    return tuple(dict.fromkeys(item.strip() for item in items if item.strip()))


def _only_strings(name: str, items: list[Any]) -> list[str]:
    if not all(isinstance(item, str) for item in items):
        raise _invalid("has an item of the wrong type in", [name], keyword="type")
    return items


def _invalid(what: str, fields: Sequence[str] = (), *, keyword: str) -> OutputInvalid:
    # Unknown names come from the model: limit their number and length.
    names = ", ".join(name[:40] for name in fields[: len(FIELDS)])
    pointer = jsontext.pointer([fields[0][:40]]) if len(fields) == 1 else ""
    return OutputInvalid(
        f"The model's answer {what}{': ' if names else ''}{names}.",
        metadata={"pointer": pointer, "keyword": keyword, "fields": names},
    )


IMAGE_ANALYSIS = Task(
    name="image-analysis",
    description="Describes one image, or several keyframes of one scene, in nine typed fields.",
    user=PROMPT,
    grammar=Grammar(
        GrammarKind.JSON_SCHEMA,
        json.dumps(schema()),
        property_order=PropertyOrder.DECLARED,
        close_objects=False,  # its one object is closed
    ),
    needs_image=True,
    schema_in_prompt=False,  # the prompt describes the fields
    parse=parse,
    document=document,
    usable=usable,
)
