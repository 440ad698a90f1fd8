"""Strict YAML: the core schema of YAML 1.2 with plain data, unique keys and bounded depth, without
aliases.

By default PyYAML reads YAML 1.1, where ``yes`` is a boolean, ``2026-11-29`` a date and ``12:30``
the number 750. This module reads them as text. Keys are always text. A number with a decimal point
or an exponent becomes a ``Decimal`` that keeps its digits: ``1.10`` stays ``1.10``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, ClassVar

import yaml

from service.schema_compiler import jsontext

MAX_DEPTH = 100
"""Maximum nesting depth; the time of the YAML scanner grows with the square of the depth."""

_OPENING = (
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)
_TAG = "tag:yaml.org,2002:"


class YamlTextError(ValueError):
    """The text is not YAML that this module accepts. The message says where and why."""


def decode(text: str) -> Any:
    """Decode one value: dict with str keys, list, str, int, Decimal, bool or None.

    Raises ``YamlTextError``.
    """
    try:
        # Aliases can expand a small file to a huge value.
        level = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            level += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if level > MAX_DEPTH:
                raise YamlTextError(f"is nested more than {MAX_DEPTH} levels deep")
            if isinstance(token, (yaml.AliasToken, yaml.AnchorToken)):
                raise YamlTextError("anchors and aliases are not allowed")
        return yaml.load(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        where = _place(error.problem_mark) if error.problem_mark else ""
        raise YamlTextError(f"is not YAML: {error.problem}{where}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlTextError(
            f"is not YAML: the character U+{ord(text[error.position]):04X} at line {line} is not "
            "allowed"
        ) from None
    except RecursionError:
        raise YamlTextError("is nested too deep") from None


def json_text(value: Any) -> str:
    """The JSON text of a value of ``decode``; numbers keep their digits."""
    if isinstance(value, dict):
        members = (f"{json_text(key)}: {json_text(item)}" for key, item in value.items())
        return "{" + ", ".join(members) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return str(value) if isinstance(value, Decimal) else json.dumps(value, ensure_ascii=False)


def _place(mark: Any) -> str:
    return f" at line {mark.line + 1}, column {mark.column + 1}"


class _CoreLoader(yaml.SafeLoader):
    """The core schema, https://yaml.org/spec/1.2.2/#103-core-schema. Other tags are refused."""

    # Without PyYAML's resolvers for YAML 1.1.
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def mapping(self, node: yaml.Node) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise YamlTextError(f"is not a mapping{_place(node.start_mark)}")
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise YamlTextError(f"a key must be text{_place(key.start_mark)}")
            name = str(key.value)
            if name in found:
                line = key.start_mark.line + 1
                raise YamlTextError(f"duplicate key {jsontext.short(name)} at line {line}")
            found[name] = self.construct_object(value, deep=True)
        return found

    def sequence(self, node: yaml.Node) -> list[Any]:
        if not isinstance(node, yaml.SequenceNode):
            raise YamlTextError(f"is not a list{_place(node.start_mark)}")
        return [self.construct_object(item, deep=True) for item in node.value]

    def text(self, node: yaml.Node) -> str:
        return str(self.construct_scalar(node))  # type: ignore[arg-type]

    def null(self, node: yaml.Node) -> None:
        self._checked(node, _NULL, "null")

    def boolean(self, node: yaml.Node) -> bool:
        return self._checked(node, _BOOL, "true or false").lower() == "true"

    def integer(self, node: yaml.Node) -> int:
        text = self._checked(node, _INT, "an integer")
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        try:
            return int(text, base)
        except ValueError:  # Python limits the number of digits that it converts
            raise YamlTextError(f"too many digits{_place(node.start_mark)}") from None

    def number(self, node: yaml.Node) -> Decimal:
        text = self._checked(node, _FLOAT, "a number")
        if "n" in text.lower():  # .inf, .nan
            raise YamlTextError(f"JSON has no number {text}{_place(node.start_mark)}")
        try:
            number = Decimal(text)
        except ArithmeticError:  # an exponent out of the decimal module's range
            number = Decimal("Infinity")
        if math.isinf(float(text)) or number.is_infinite():
            raise YamlTextError(f"a number is too large or too small{_place(node.start_mark)}")
        return number

    def other(self, node: yaml.Node) -> None:
        raise YamlTextError(
            f"is not YAML: the tag {jsontext.short(node.tag)} is not allowed"
            f"{_place(node.start_mark)}"
        )

    def _checked(self, node: yaml.Node, pattern: re.Pattern[str], kind: str) -> str:
        """The text of a scalar. Raises if the text does not match its explicit tag."""
        text = self.text(node)
        if not pattern.fullmatch(text):
            raise YamlTextError(f"{jsontext.short(text)} is not {kind}{_place(node.start_mark)}")
        return text


_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


def _resolve(kind: str, pattern: re.Pattern[str], first: Iterable[str]) -> None:
    _CoreLoader.add_implicit_resolver(_TAG + kind, re.compile(rf"(?:{pattern.pattern})\Z"), first)


_resolve("null", _NULL, [*"nN~", ""])
_resolve("bool", _BOOL, "tTfF")
_resolve("int", _INT, "-+0123456789")  # before float, whose pattern also matches integers
_resolve("float", _FLOAT, "-+.0123456789")
for _kind, _constructor in {
    "map": _CoreLoader.mapping,
    "seq": _CoreLoader.sequence,
    "str": _CoreLoader.text,
    "null": _CoreLoader.null,
    "bool": _CoreLoader.boolean,
    "int": _CoreLoader.integer,
    "float": _CoreLoader.number,
}.items():
    _CoreLoader.add_constructor(_TAG + _kind, _constructor)
_CoreLoader.add_constructor(None, _CoreLoader.other)
