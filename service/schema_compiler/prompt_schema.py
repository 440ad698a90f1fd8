"""The text of a JSON schema as a model reads it in its prompt: compact, with the descriptions.

Everything that says what an answer is stays, in the order of the author: descriptions, titles, examples,
defaults and every keyword that constrains, with the digits of its numbers. Only what tells a model
nothing is left out, because each token costs time: whitespace, ``$schema``, ``$comment``, and titles
that repeat the name of their property, which pydantic writes for every field.
"""

from __future__ import annotations

import re
from typing import Any

from service.schema_compiler import jsontext
from service.schema_compiler.exact import text_of
from service.schema_compiler.frontend.keywords import children
from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits

_NO_WORD = re.compile(r"[\W_]+")


def prompt_schema(text: str, limits: SchemaLimits = DEFAULT_LIMITS) -> str:
    """The text for the prompt. text: a schema that was checked under the limits."""
    document = jsontext.decode(text, max_depth=limits.max_depth, exact=True)
    pending: list[tuple[Any, str]] = [(document, "")]
    while pending:
        schema, name = pending.pop()
        if not isinstance(schema, dict):
            continue
        for _, path, child in children(schema):
            pending.append((child, str(path[1]) if len(path) > 1 else ""))
        for keyword in ("$schema", "$comment"):
            schema.pop(keyword, None)
        title = schema.get("title")
        if isinstance(title, str) and _plain(title) == _plain(name):
            del schema["title"]
    return text_of(document, compact=True)


def _plain(text: str) -> str:
    """A name without what differs between ``total_tax`` and ``Total Tax``."""
    return _NO_WORD.sub("", text).casefold()
