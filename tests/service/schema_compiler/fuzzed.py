"""Schemas made from other schemas by chance: most of them odd, some of them no schemas any more."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from service.errors import GrammarError
from service.schema_compiler.frontend.checked_schema import check_json_schema

Container = dict[str, Any] | list[Any]
TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")
NAMES = ("a", "b", "c", "kind", "é", "", "a/b", "x~y", "$ref", "\u2028", '"')
PATTERNS = ("^a", "b$", "^[a-c]{2,4}$", "[0-9]+", "^$", "", "^(x|yy)*$", ".", "^.{3}$", "\\d", "(")
FORMATS = (
    "date",
    "date-time",
    "time",
    "email",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
    "hostname",
    "regex",
    "odd",
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    10,
    0.5,
    -0.25,
    1.5,
    100,
    1e3,
    2**53 + 1,
    -(2**31),
    1e308,
    5e-324,
    10**30,
)
COUNTS = (0, 1, 2, 3, 5, 20, 1000, 10**9, -1, 1.0, 1.5)
DIALECTS = (
    "https://json-schema.org/draft/2020-12/schema", "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema#", "http://json-schema.org/draft-06/schema#",
    "http://json-schema.org/draft-04/schema#",
)  # fmt: skip
REFERENCES = (
    "#",
    "#/$defs/a",
    "#/definitions/a",
    "#/properties/a",
    "#x",
    "#/nothing",
    "other",
    "#/allOf/0",
)


class Fuzzer:
    """The same seed gives the same schemas."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        pick = self.rng.choice
        lists: Callable[[], Any] = lambda: [self.schema() for _ in range(self.rng.randint(1, 3))]  # noqa: E731
        named: Callable[[], Any] = lambda: {  # noqa: E731
            pick(NAMES): self.schema() for _ in range(self.rng.randint(0, 3))
        }
        self.keywords: dict[str, Callable[[], Any]] = {
            "type": lambda: pick([pick(TYPES), self.rng.sample(TYPES, 2)]),
            "enum": lambda: [self.value() for _ in range(self.rng.randint(1, 4))],
            "const": self.value,
            "required": lambda: self.rng.sample(NAMES, self.rng.randint(0, 3)),
            "pattern": lambda: pick(PATTERNS),
            "format": lambda: pick(FORMATS),
            "uniqueItems": lambda: pick([True, False]),
            "multipleOf": lambda: pick(NUMBERS),
            "patternProperties": lambda: {pick(PATTERNS): self.schema()},
            "dependentRequired": lambda: {pick(NAMES): [pick(NAMES)]},
            "dependencies": lambda: {pick(NAMES): pick([[pick(NAMES)], self.schema()])},
            "$ref": lambda: pick(REFERENCES),
            "$dynamicRef": lambda: pick(REFERENCES),
            "$anchor": lambda: "x",
            "$dynamicAnchor": lambda: "x",
            "$schema": lambda: pick(DIALECTS),
            "items": lambda: pick([self.schema, lists])(),
            "title": lambda: "T",
            "default": self.value,
            **dict.fromkeys(("minimum", "maximum"), lambda: pick(NUMBERS)),
            **dict.fromkeys(
                ("exclusiveMinimum", "exclusiveMaximum"), lambda: pick([pick(NUMBERS), True])
            ),
            **dict.fromkeys(
                ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
                 "minContains", "maxContains"),
                lambda: pick(COUNTS),
            ),
            **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), lists),
            **dict.fromkeys(
                ("not", "if", "then", "else", "additionalProperties", "additionalItems", "contains",
                 "propertyNames", "unevaluatedItems", "unevaluatedProperties"),
                self.schema,
            ),
            **dict.fromkeys(("properties", "$defs", "definitions", "dependentSchemas"), named),
        }  # fmt: skip
        self.depth = 0

    def schema(self) -> Any:
        """A small schema, mostly valid."""
        if self.depth > 2 or self.rng.random() < 0.15:
            return self.rng.choice(
                [True, False, {}, {"type": self.rng.choice(TYPES)}, {"$ref": "#"}]
            )
        self.depth += 1
        chosen = self.rng.sample(sorted(self.keywords), self.rng.randint(1, 3))
        found = {keyword: self.keywords[keyword]() for keyword in chosen}
        self.depth -= 1
        return found

    def value(self) -> Any:
        """Any JSON value."""
        simple = (None, True, False, "", "a", "é\u2028", *NUMBERS)
        kind = self.rng.random()
        if kind < 0.8 or self.depth > 3:
            return self.rng.choice(simple)
        self.depth += 1
        found: Any = [self.value() for _ in range(2)]
        if kind < 0.9:
            found = {self.rng.choice(NAMES): one for one in found}
        self.depth -= 1
        return found

    def mutated(self, schema: Any) -> str:
        """The text of a schema after some changes; sometimes changed as text at the end."""
        holder = [copy.deepcopy(schema)]
        for _ in range(self.rng.randint(1, 4)):
            self._change_inplace(holder)
        text = json.dumps(holder[0], ensure_ascii=self.rng.random() < 0.5)
        return self._bytes_changed(text) if self.rng.random() < 0.08 else text

    def _change_inplace(self, holder: list[Any]) -> None:
        places = [
            (container, key)
            for container in _containers(holder)
            for key in (container if isinstance(container, dict) else range(len(container)))
        ]
        container, key = self.rng.choice(places)
        old: Any = container[key]
        match self.rng.randrange(8):
            case 0:
                container[key] = self.schema()
            case 1:
                container[key] = self.value()
            case 2 if len(holder) > 1 or container is not holder:
                del container[key]
            case 3 if isinstance(container, dict):
                container[self.rng.choice(sorted(self.keywords))] = container.pop(key)
            case 4:
                other, place = self.rng.choice(places)
                container[key] = copy.deepcopy(other[place])
            case 5:
                wrapper = self.rng.choice(["allOf", "anyOf", "oneOf", "not", "items", "if"])
                many = wrapper in ("allOf", "anyOf", "oneOf")
                container[key] = {wrapper: [old, self.schema()] if many else old}
            case _ if isinstance(old, dict):
                keyword = self.rng.choice(sorted(self.keywords))
                old[keyword] = self.keywords[keyword]()
            case _:
                container[key] = self.value()

    def _bytes_changed(self, text: str) -> str:
        data = list(text)
        for _ in range(self.rng.randint(1, 3)):
            place = self.rng.randrange(len(data) + 1)
            end = min(len(data), place + self.rng.randint(0, 4))
            data[place:end] = self.rng.choice(
                [
                    "",
                    '"',
                    "{",
                    "}",
                    ",",
                    ":",
                    "\\",
                    "\0",
                    "\ud800",
                    "9" * 20,
                    "e",
                    "".join(data[:5]),
                ]
            )
        return "".join(data)


def fuzzed(seeds: Sequence[Any], count: int, seed: int = 0) -> Iterator[str]:
    """So many schemas as text: mutations of the seeds, and every tenth made from nothing.

    Chance alone makes schemas that nobody admits; for three of four it has several tries.
    """
    fuzzer = Fuzzer(seed)
    for number in range(count):
        tries = 1 if number % 4 == 0 else 12
        for _ in range(tries):
            start = fuzzer.schema() if number % 10 == 0 else seeds[number % len(seeds)]
            text = fuzzer.mutated(start)
            if tries > 1 and _admitted(text):
                break
        yield text


def _admitted(text: str) -> bool:
    try:
        check_json_schema(text)
    except GrammarError:
        return False
    return True


def _containers(value: Any) -> Iterator[Container]:
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, (dict, list)):
            if one:
                yield one
            pending += one.values() if isinstance(one, dict) else one
