"""Envelopes: what APIs wrap a schema in, sent in place of the schema.

``{"name": …, "strict": true, "schema": {…}}`` is a JSON Schema by the letter, one that allows every
value, since none of its members is a keyword.
"""

from __future__ import annotations

from typing import Any

from service.schema_compiler.frontend.drafts import ASSERTING
from service.schema_compiler.frontend.metaschema import plausible

MEMBERS = (
    "schema", "json_schema", "jsonSchema", "input_schema", "inputSchema", "output_schema",
    "outputSchema", "response_schema", "responseSchema", "response_json_schema",
    "responseJsonSchema", "parameters", "function", "tool", "response_format", "responseFormat",
    "format", "text", "guided_json",
)  # fmt: skip
"""Members that hold a schema, or an envelope of one: of OpenAI's response formats and functions, MCP,
Anthropic's tools, Gemini, Ollama and vLLM."""
_MAX_LEVELS = 4
_DEFINITIONS = ("$defs", "definitions")


def enveloped(document: dict[str, Any]) -> tuple[str, ...]:
    """The path to the schema in an envelope; empty where the document is no envelope."""
    path: tuple[str, ...] = ()
    while len(path) < _MAX_LEVELS and not constrains(document):
        name = next((name for name in MEMBERS if _holds_schema(document.get(name))), None)
        if name is None:
            break
        path, document = (*path, name), document[name]
    return path if path and looks_like_schema(document) else ()


def constrains(schema: dict[str, Any]) -> bool:
    """Whether a subschema has a keyword that asserts something, of a value that it can have."""
    return any(keyword in ASSERTING and plausible(keyword, schema[keyword]) for keyword in schema)


def looks_like_schema(value: Any) -> bool:
    """Whether a value is a schema by its keywords, and not just an object."""
    return isinstance(value, dict) and (
        constrains(value) or any(isinstance(value.get(name), dict) for name in _DEFINITIONS)
    )


def _holds_schema(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return looks_like_schema(value) or any(isinstance(value.get(name), dict) for name in MEMBERS)
