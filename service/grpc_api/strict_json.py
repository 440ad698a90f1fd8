"""Protobuf's JSON -> a message, strictly.

Protobuf's own parser takes ``[]`` for a message, skips characters that are not base64, and the last of
two equal keys: wrong input would become another request. What it accepts by mistake is refused
here before it sees it, and so are wrong values that it describes in terms of Python. Bytes are
decoded here, too: its decoder is a hundred times slower.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pybase64
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message

from service.schema_compiler import jsontext

MAX_DEPTH = 64
"""How deep the messages of a request may nest."""
URL_SAFE = re.compile("[-_]")
WHOLE = re.compile("-?[0-9]{1,20}")
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?|NaN|-?Infinity")
"""Numbers as text, which protobuf takes, too."""
WHOLES = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}
NUMBERS = {FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE}
Place = tuple[str | int, ...]


class UnknownField(ParseError):
    """A message has no field of a name that is given."""


def parse(data: bytes, message: Message) -> None:
    """Read a JSON object into a message, which is empty.

    Raises ``ParseError``, ``UnknownField`` among them, or ``UnicodeDecodeError`` for bytes that are
    not UTF-8.
    """
    if not data:
        raise ParseError("the body is empty; send a JSON object")
    try:
        value = jsontext.decode(data.decode("utf-8"))
    except jsontext.JsonTextError as error:
        raise ParseError(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ParseError("the body is not a JSON object")
    taken = list(_taken(value, message.DESCRIPTOR, ()))
    ParseDict(value, message, max_recursion_depth=MAX_DEPTH)
    for place, content in taken:
        _put(message, place, content)


def _taken(value: dict[str, Any], descriptor: Any, place: Place) -> Iterator[tuple[Place, bytes]]:
    """Take the bytes out of an object, which gets empty texts in their place. Yields where they were
    and what they are."""
    known = _fields(descriptor)
    chosen: dict[str, str] = {}
    if len(place) > 2 * MAX_DEPTH:
        raise ParseError(f"the messages are nested deeper than {MAX_DEPTH}")
    for key, given in value.items():
        field = known.get(key)
        if field is None and not _has(descriptor, key):
            names = ", ".join(one.json_name for one in descriptor.fields)
            where = _spelt(place) or "the body"
            raise UnknownField(
                f"{where} has no field named {jsontext.short(key)}; it takes: {names}"
            )
        if field is None or given is None:
            continue
        oneof = field.containing_oneof
        if oneof is not None and (other := chosen.setdefault(oneof.name, key)) != key:
            raise ParseError(f"{_spelt(place) or 'the body'} takes only one of {other} and {key}")
        here = (*place, field.name)
        if field.is_repeated:
            if not isinstance(given, list):
                raise ParseError(f"{_spelt(here)} must be a list")
            for index, one in enumerate(given):
                given[index], found = _converted(one, field, (*here, index))
                yield from found
        else:
            value[key], found = _converted(given, field, here)
            yield from found


def _converted(
    given: Any, field: FieldDescriptor, place: Place
) -> tuple[Any, list[tuple[Place, bytes]]]:
    """What protobuf gets in place of a value, and the bytes that were taken out of it."""
    if field.message_type is not None:
        if not isinstance(given, dict):
            raise ParseError(f"{_spelt(place)} must be an object")
        return given, list(_taken(given, field.message_type, place))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return "", [(place, _decoded(given, place))]
    _check(given, field, place)
    return given, []


def _check(given: Any, field: FieldDescriptor, place: Place) -> None:
    """Refuse a wrong text, switch, number or name of an enum. Protobuf checks ranges."""
    if field.type == FieldDescriptor.TYPE_STRING and not isinstance(given, str):
        as_text = ", with the JSON inside the text" if isinstance(given, dict | list) else ""
        raise ParseError(f"{_spelt(place)} must be text{as_text}")
    if field.type == FieldDescriptor.TYPE_BOOL and not isinstance(given, bool):
        raise ParseError(f"{_spelt(place)} must be true or false")
    if field.enum_type is not None:
        names = [one.name for one in field.enum_type.values]
        if given not in names and not _is_whole(given):
            raise ParseError(f"{_spelt(place)} must be one of: {', '.join(names)}")
    if field.cpp_type in WHOLES and not _is_whole(given):
        raise ParseError(f"{_spelt(place)} must be a whole number")
    if field.cpp_type in NUMBERS and not _is_number(given):
        raise ParseError(f"{_spelt(place)} must be a number")


def _is_whole(given: Any) -> bool:
    if isinstance(given, str):
        return WHOLE.fullmatch(given) is not None
    return _is_number(given) and given == int(given)


def _is_number(given: Any) -> bool:
    if isinstance(given, str):
        return NUMBER.fullmatch(given) is not None
    return isinstance(given, int | float) and not isinstance(given, bool)


def _decoded(given: Any, place: Place) -> bytes:
    """Base64 in the standard or the URL-safe alphabet, with or without padding."""
    if not isinstance(given, str):
        raise ParseError(f"{_spelt(place)} must be text in base64")
    missing = -len(given) % 4
    text = given + "=" * missing if missing in (1, 2) else given
    if URL_SAFE.search(text) and "+" not in text and "/" not in text:
        text = text.replace("-", "+").replace("_", "/")
    try:
        return pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ParseError(f"{_spelt(place)} is not base64") from None


def _put(message: Any, place: Place, content: bytes) -> None:
    *path, last = place
    if isinstance(last, int):  # of a repeated field
        *path, name = path
        for step in path:
            message = message[step] if isinstance(step, int) else getattr(message, step)
        getattr(message, str(name))[last] = content
        return
    for step in path:
        message = message[step] if isinstance(step, int) else getattr(message, step)
    setattr(message, last, content)


@cache
def _fields(descriptor: Any) -> Mapping[str, FieldDescriptor]:
    """The fields of a message by their names in JSON. Those with a JSON form of their own are left
    to protobuf: maps and the messages of Google."""
    return {
        name: field
        for field in descriptor.fields
        for name in (field.json_name, field.name)
        if field.message_type is None
        or not (
            field.message_type.full_name.startswith("google.protobuf.")
            or field.message_type.GetOptions().map_entry
        )
    }


def _has(descriptor: Any, name: str) -> bool:
    """Whether a message has a field of this name."""
    return name in descriptor.fields_by_name or name in descriptor.fields_by_camelcase_name


def _spelt(place: Place) -> str:
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text
