"""Finds parts of a conversation that are not text, for the formats of every API of LMDeploy. Pure
functions.

The module has lists of allowed types, not of forbidden ones: a part of any type other than text and
tool is reported, so that a new name for an image is refused, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

TEXT = frozenset({
    "text", "input_text", "output_text", "summary_text", "reasoning_text", "refusal", "message",
    "thinking", "redacted_thinking", "reasoning", "search_result",
})  # fmt: skip
"""Types of parts and items with text only."""
TOOL = re.compile(r"(\w+_)?(call|call_output|use|result)")
"""Types of tool calls and their results, which have names, JSON, and parts in ``content`` or
``output``."""
MEDIUM = re.compile(r"image|image|video|audio|time_series|document|file|screenshot")
"""Words in the name of a type that mean media. Checked before `TOOL`: an ``image_generation_call``
contains an image."""
MEDIUM_KEY = re.compile(r"(input_)?(image|video|audio|time_series)s?(_(url|data|path|file|id)s?)?")
"""Keys of a message, a part or a request body with images, video, audio or time series."""
NESTED = ("content", "output")
"""Keys under which a message, an item or a tool result has its parts."""
CONVERSATION = ("messages", "system", "input", "prompt")
"""Fields of a request body with a conversation."""
SHOWN = 40
"""Maximum number of characters of a caller's word in a report."""


def find(conversation: Any, where: str) -> str | None:
    """The first part of a conversation that is not text.

    Args:
        conversation: a text, token ids, a message, a part, or nested lists of these.
        where: name of the conversation in the report.

    Returns:
        Its path and type, as in ``messages[0].content[1] is of type 'image_url'``; None if
        everything is text.
    """
    # An explicit stack instead of recursion, because callers choose the nesting depth.
    pending = [(conversation, where)]
    while pending:
        value, place = pending.pop()
        if _is_scalar(value):
            continue
        if isinstance(value, list | tuple):
            items = [(x, f"{place}[{i}]") for i, x in enumerate(value) if not _is_scalar(x)]
            pending += reversed(items)
        elif isinstance(value, dict):
            for problem in _own_problems(value, place):
                return problem
            pending += [(value[key], f"{place}.{key}") for key in reversed(NESTED) if key in value]
        else:
            return f"{place} is an object of class {type(value).__name__}"
    return None


def find_in_body(body: Any) -> str | None:
    """The same for a parsed request body of any endpoint that generates or counts tokens."""
    if not isinstance(body, dict):
        return None
    for problem in _media_keys(body, ""):
        return problem
    found = (find(body.get(field), field) for field in CONVERSATION)
    return next((problem for problem in found if problem is not None), None)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _own_problems(node: dict[Any, Any], place: str) -> Iterator[str]:
    kind = node.get("type")
    if kind is not None and not _is_text(kind):
        yield f"{place} is of type {str(kind)[:SHOWN]!r}"
    yield from _media_keys(node, f"{place}.")


def _is_text(kind: Any) -> bool:
    if not isinstance(kind, str) or MEDIUM.search(kind):
        return False
    return kind in TEXT or TOOL.fullmatch(kind) is not None


def _media_keys(node: dict[Any, Any], prefix: str) -> Iterator[str]:
    for key, value in node.items():
        empty = value is None or value in ("", [], {})  # SDKs send unused fields as null or empty
        if isinstance(key, str) and MEDIUM_KEY.fullmatch(key) and not empty:
            yield f"{prefix}{key} is set"
