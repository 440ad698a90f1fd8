"""The ImageAnalysis task: one picture, or several keyframes of one scene, described in nine typed fields."""

from __future__ import annotations

from typing import Any

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
