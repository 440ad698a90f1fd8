"""From the bytes of a body to a checked model; every error names the field as the caller wrote it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from service.errors import FieldViolation, InvalidRequest
from service.http_api.fields import NEUTRAL, REFUSED, UNKNOWN_KIND, Model
from service.schema_compiler import jsontext

M = TypeVar("M", bound=Model)

BODY = "body"
"""The field of an error about the whole body."""
MAX_VIOLATIONS = 16


def read_json(body: bytes) -> Any:
    """The JSON value of a body; numbers with a point or an exponent are exact ``Decimal``.

    Raises ``InvalidRequest`` for anything that is not strict JSON: duplicate keys, NaN, numbers that
    are too large, too deep nesting, text that is not UTF-8.
    """
    if not body:
        raise _malformed("is empty; send a JSON object")
    try:
        return jsontext.decode(body.decode("utf-8"), exact=True)
    except UnicodeDecodeError:
        raise _malformed("is not UTF-8") from None
    except jsontext.JsonTextError as error:
        raise _malformed(f"is not JSON: {error}") from None


def read_model(kind: type[M], document: Any) -> M:
    """A JSON value as a model. Raises ``InvalidRequest`` with every field that is wrong."""
    if not isinstance(document, dict):
        raise _malformed("must be a JSON object")
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=True, include_input=True)
    unknown = all(one["type"] == "extra_forbidden" for one in found)
    violations = [_violation(kind, document, one) for one in found[:MAX_VIOLATIONS]]
    first, *more = violations
    raise InvalidRequest(
        first.field,
        first.description,
        reason="UNKNOWN_FIELD" if unknown else None,
        more=tuple(more),
    )


def _malformed(description: str) -> InvalidRequest:
    return InvalidRequest(BODY, description, reason="MALFORMED_REQUEST")


def _violation(kind: type[Model], document: Any, error: ErrorDetails) -> FieldViolation:
    path = _path(document, error["loc"], error["type"])
    name = path[0] if path else ""
    field = kind.model_fields.get(str(name))
    extra = field.json_schema_extra if field is not None else None
    treatment = extra.get("x-treatment") if isinstance(extra, dict) else None
    if field is not None and treatment in (NEUTRAL, REFUSED):
        return FieldViolation(str(name), _sentence(field.description or ""))
    return FieldViolation(_spelt(path) or BODY, _description(kind, path, error))


def _path(document: Any, location: Sequence[str | int], kind: str) -> list[str | int]:
    """The location without the tags of unions, which pydantic puts between the keys."""
    found: list[str | int] = []
    value: Any = document
    for position, step in enumerate(location):
        index = isinstance(value, list) and isinstance(step, int)
        if index or (isinstance(value, dict) and step in value):
            value = value[step]
            found.append(step)
        elif kind == "missing" and position == len(location) - 1:
            found.append(step)
    return found


def _spelt(path: Iterable[str | int]) -> str:
    """``messages[0].content`` of a path."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            shown = step if step.isidentifier() and len(step) <= 64 else jsontext.short(step)
            text += f".{shown}" if text else shown
    return text


def _description(kind: type[Model], path: Sequence[str | int], error: ErrorDetails) -> str:
    what = error["type"]
    if what == "missing":
        return "is required"
    if what == "extra_forbidden":
        return _unknown(kind, path)
    if what == UNKNOWN_KIND:
        key, _, known = error["msg"].partition("|")
        given = error["input"].get(key) if isinstance(error["input"], dict) else None
        found = (
            f"has the {key} {jsontext.short(given)}" if isinstance(given, str) else f"needs a {key}"
        )
        return f"{found}; this server takes: {known}"
    if what == "none_required":
        return "is not supported; leave it out"
    if what == "string_pattern_mismatch":
        return "must be 1 to 64 letters, digits, underscores and hyphens"
    text = (
        error["msg"]
        .replace("Input should be", "must be")
        .replace("a valid boolean", "true or false")
    )
    return text[0].lower() + text[1:].replace("valid dictionary", "JSON object")


def _unknown(kind: type[Model], path: Sequence[str | int]) -> str:
    name = str(path[-1]) if path else ""
    if len(path) > 1:
        return "is a field that this server does not know; leave it out"
    if name in kind.hints:
        return f"is not a field of this API; {kind.hints[name]}"
    close = difflib.get_close_matches(name[:100], kind.model_fields, n=1, cutoff=0.8)
    hint = f"did you mean {close[0]}?" if close else "leave it out"
    return f"is a field that this server does not know; {hint}"


def _sentence(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")
