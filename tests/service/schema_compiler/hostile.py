"""Schemas, regular expressions, EBNF and choices made to cost time or memory, or to confuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits
from service.types import Grammar, GrammarKind

LARGE = SchemaLimits(max_bytes=1 << 20)
"""What an operator may allow."""


@dataclass(frozen=True)
class Hostile:
    """A grammar and the limits that it comes with."""

    name: str
    grammar: Grammar
    limits: SchemaLimits = DEFAULT_LIMITS


def schema(name: str, content: Any, limits: SchemaLimits = DEFAULT_LIMITS) -> Hostile:
    """content: the schema, or its text where the text is the point."""
    text = content if isinstance(content, str) else json.dumps(content)
    return Hostile(name, Grammar(GrammarKind.JSON_SCHEMA, text), limits)


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def of(*names: str) -> dict[str, Any]:
    return closed(**dict.fromkeys(names, True))


def nested(keyword: str, depth: int, inner: Any, width: int = 1) -> Any:
    """A list keyword within itself, with so many branches that differ at each step."""
    for level in range(depth):
        others = [{"const": f"{level}-{number}"} for number in range(width - 1)]
        inner = {keyword: [inner, *others]}
    return inner


def wrapped(keyword: str, depth: int, inner: Any) -> Any:
    for _ in range(depth):
        inner = {keyword: inner}
    return inner


def doubling(keyword: str, depth: int, last: Any) -> dict[str, Any]:
    """Each definition refers twice to the next: written out, 2 ** depth copies of the last."""
    definitions = {
        f"d{level}": {keyword: [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(depth)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{depth}": last}}


def ranges(count: int) -> list[dict[str, Any]]:
    return [{"minimum": 10 * i, "maximum": 10 * i + 15} for i in range(count)]


def keyed(count: int) -> list[dict[str, Any]]:
    """Objects told apart by which optional names they have."""
    return [
        {"type": "object", "properties": {f"k{i}": {"type": "integer"}}, "required": [f"k{i}"]}
        for i in range(count)
    ]


def products(count: int, width: int) -> dict[str, Any]:
    """count choices among width: width ** count alternatives when multiplied out."""
    return {
        "allOf": [
            {"anyOf": [
                {"properties": {f"p{i}": {"const": j}}, "required": [f"p{i}"]} for j in range(width)
            ]}
            for i in range(count)
        ]
    }  # fmt: skip


def web(count: int) -> dict[str, Any]:
    """Every definition may hold every other one."""
    references = [{"$ref": f"#/$defs/n{i}"} for i in range(count)]
    one = {"type": "object", "properties": {"next": {"anyOf": references}}, "maxProperties": 1}
    return {"$ref": "#/$defs/n0", "$defs": {f"n{i}": one for i in range(count)}}


TWO_WAYS = closed(a={"$ref": "#/$defs/b"}) | {
    "$defs": {"b": closed(c={"$ref": "#/$defs/d"}), "d": closed(e={"$ref": "#/$defs/b"})}
}
TREE = {
    "$ref": "#/$defs/t",
    "$defs": {
        "t": {"anyOf": [{"type": "null"}, closed(l={"$ref": "#/$defs/t"}, r={"$ref": "#/$defs/t"})]}
    },
}
DYNAMIC = {
    "$id": "https://example.org/tree",
    "$dynamicAnchor": "node",
    "type": "object",
    "properties": {"data": True, "children": {"type": "array", "items": {"$dynamicRef": "#node"}}},
}
META = {"$ref": "https://json-schema.org/draft/2020-12/schema"}


def composition() -> Iterator[Hostile]:
    yield schema("oneOf within oneOf", nested("oneOf", 12, {"type": "string"}, 3))
    yield schema("anyOf within anyOf", nested("anyOf", 12, {"type": "string"}, 3))
    yield schema("allOf within allOf", nested("allOf", 25, {"type": "string"}))
    yield schema("not within not", wrapped("not", 61, {"type": "string"}))
    yield schema("if within if", wrapped("if", 30, {"type": "string"}) | {"then": False})
    yield schema("allOf of anyOf, 2 ** 16", products(16, 2))
    yield schema("allOf of anyOf, 5 ** 8", products(8, 5))
    yield schema("oneOf of 40 that overlap", {"type": "integer", "oneOf": ranges(40)})
    yield schema("oneOf of 12 objects by name", {"oneOf": keyed(12)})
    yield schema("oneOf of the same", {"oneOf": [{"type": "string"}] * 50})
    yield schema("not of 2 ** 12", {"type": "object", "not": products(12, 2)})
    yield schema("doubled allOf", doubling("allOf", 25, {"type": "string"}))
    yield schema("doubled anyOf", doubling("anyOf", 25, {"type": "string"}))
    yield schema("doubled oneOf", doubling("oneOf", 25, {"type": "string"}))
    yield schema("doubled items", doubling("prefixItems", 25, {"type": "string"}))
    conditions = [
        {"if": {"properties": {f"p{i}": {"const": 1}}, "required": [f"p{i}"]},
         "then": {"required": [f"q{i}"]}, "else": {"properties": {f"q{i}": False}}}
        for i in range(20)
    ]  # fmt: skip
    yield schema("20 conditions", {"type": "object", "allOf": conditions})
    names = [f"n{i}" for i in range(24)]
    chain = {one: [names[(i + 1) % 24], names[(i + 7) % 24]] for i, one in enumerate(names)}
    yield schema(
        "dependencies in rings",
        {"type": "object", "properties": dict.fromkeys(names, True), "dependentRequired": chain,
         "additionalProperties": False},
    )  # fmt: skip
    yield schema("false everywhere", {
        "properties": {"a": False}, "required": ["a"], "items": False, "contains": False,
        "additionalProperties": False, "propertyNames": False, "anyOf": [False, False],
    })  # fmt: skip
    yield schema("type array of everything, twice", {
        "type": ["null", "boolean", "object", "array", "number", "string", "integer"],
        "not": {"type": ["null", "boolean", "object", "array", "number", "string"]},
    })  # fmt: skip
    yield schema("unevaluated behind alternatives", {
        "anyOf": keyed(8), "unevaluatedProperties": False, "unevaluatedItems": False,
    })  # fmt: skip


def references() -> Iterator[Hostile]:
    yield schema("a loop of references", {"$ref": "#"})
    yield schema(
        "a loop through allOf",
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
    )
    yield schema("a web of 100 references", web(100))
    yield schema("endless objects", TWO_WAYS)
    yield schema("endless list", {"type": "array", "items": {"$ref": "#"}, "minItems": 1})
    yield schema("a tree", TREE)
    yield schema("a tree that is not one", {"allOf": [TREE["$defs"]["t"]], **TREE, "not": TREE})
    yield schema("dynamic reference", DYNAMIC)
    yield schema(
        "dynamic reference to nothing", {"$dynamicRef": "#none", "$defs": {"a": {"$anchor": "b"}}}
    )
    yield schema(
        "dynamic anchors twice",
        {"$defs": {"a": {"$dynamicAnchor": "x", "type": "string"},
                   "b": {"$dynamicAnchor": "x", "type": "integer"}}, "$dynamicRef": "#x"},
    )  # fmt: skip
    yield schema(
        "recursive reference of 2019-09",
        {"$schema": "https://json-schema.org/draft/2019-09/schema", "$recursiveAnchor": True,
         "properties": {"a": {"$recursiveRef": "#"}}},
    )  # fmt: skip
    yield schema("the schema of schemas", META)
    yield schema("a reference into const", {"const": {"type": "integer"}, "$ref": "#/const"})
    yield schema(
        "a reference by escapes", {"$ref": "#/$defs/a~1b%25~0", "$defs": {"a/b%~": {"const": 1}}}
    )
    yield schema("a reference to a file", {"$ref": "file:///etc/passwd"})
    yield schema("a reference to a host", {"$ref": "http://127.0.0.1:1/x"})
    yield schema("a reference that is no address", {"$ref": "http://[::"})
    yield schema("ids that move the base", {
        "$id": "http://a/", "$defs": {"x": {"$id": "b/", "$ref": "#/$defs/y", "$defs": {"y": True}}},
        "$ref": "b/",
    })  # fmt: skip


def shapes() -> Iterator[Hostile]:
    yield schema("64 deep", '{"items":' * 63 + "{}" + "}" * 63)
    yield schema("65 deep", '{"items":' * 64 + "{}" + "}" * 64)
    yield schema("30,000 brackets", "[" * 30_000)
    deep: Any = {"type": "string"}
    for _ in range(21):
        deep = closed(a=deep, b=deep if _ < 6 else True)
    yield schema("deep objects, wide at the end", deep)
    many = {f"{i:x}": True for i in range(5000)}
    yield schema("5,000 properties", {"properties": many})
    yield schema("5,000 closed properties", {"properties": many, "additionalProperties": False})
    large = {f"name{i}": {"type": "integer"} for i in range(10_000)}
    yield schema("10,000 properties over the limit", closed(**large))
    yield schema("10,000 properties where allowed", closed(**large), LARGE)
    yield schema(
        "10,000 optional properties where allowed",
        {"type": "object", "properties": large, "additionalProperties": False}, LARGE,
    )  # fmt: skip
    yield schema("300 properties, 150 of them", {
        "type": "object", "properties": {f"p{i}": True for i in range(300)},
        "additionalProperties": False, "minProperties": 150, "maxProperties": 160,
    })  # fmt: skip
    yield schema("7,500 strings", {"enum": [f"{i:x}" for i in range(7500)]})
    yield schema("an enum of one long string", {"enum": ["x" * 60_000]})
    yield schema("an enum of what is almost equal", {
        "enum": [1, 1.0, True, 0, False, -0.0, "1", [1], [1.0], {"a": 1}, {"a": 1.0}, None, "null"],
    })  # fmt: skip
    yield schema(
        "an enum without JSON texts in common", {"type": "string", "enum": [1, None, [], {}]}
    )
    yield schema("a billion items", {"items": {"type": "null"}, "minItems": 10**9})
    yield schema(
        "at most a billion items", {"type": "array", "maxItems": 10**9, "items": {"const": 1}}
    )
    yield schema("lists in lists in lists", {
        "type": "array", "minItems": 100, "maxItems": 1000, "items": {
            "type": "array", "minItems": 100, "maxItems": 1000, "items": {
                "type": "array", "minItems": 100, "maxItems": 1000, "items": {"type": "null"}}},
    })  # fmt: skip
    yield schema("unique items of two", {
        "type": "array", "uniqueItems": True, "minItems": 3, "items": {"enum": [0, 1]},
    })  # fmt: skip
    yield schema("contains what items forbid", {
        "type": "array", "items": {"type": "string"}, "contains": {"type": "null"}, "minContains": 5,
    })  # fmt: skip
    yield schema("contains 50 to 60 of 1,000", {
        "type": "array", "contains": {"const": 1}, "minContains": 50, "maxContains": 60,
        "maxItems": 1000,
    })  # fmt: skip
    yield schema(
        "2,000 places", {"prefixItems": [{"const": i} for i in range(2000)], "items": False}
    )
    yield schema("bounds that cross", {
        "type": ["string", "array", "object", "number"], "minLength": 2, "maxLength": 1, "minItems": 2,
        "maxItems": 1, "minProperties": 2, "maxProperties": 1, "minimum": 2, "maximum": 1,
    })  # fmt: skip


def scalars() -> Iterator[Hostile]:
    yield schema("a billion characters", {"type": "string", "minLength": 10**9})
    yield schema("at most a billion characters", {"type": "string", "maxLength": 10**9})
    yield schema("lengths of 3,000 digits", f'{{"type": "string", "minLength": {"9" * 3000}}}')
    yield schema("a number of 5,000 digits", f'{{"minimum": {"9" * 5000}}}')
    yield schema("a bound of 4,000 digits", f'{{"type": "integer", "minimum": {"9" * 4000}}}')
    yield schema("an exponent of 9 digits", '{"type": "number", "maximum": 1e999999999}')
    yield schema("bounds at the ends of doubles", {
        "type": "number", "minimum": 5e-324, "exclusiveMaximum": 1.7976931348623157e308,
    })  # fmt: skip
    yield schema("multiples of almost nothing", {"type": "number", "multipleOf": 5e-324})
    yield schema("multiples of two primes", {
        "type": "integer", "allOf": [{"multipleOf": 999_983}, {"multipleOf": 1_000_003}],
    })  # fmt: skip
    yield schema("multiples within a narrow gap", {
        "type": "integer", "multipleOf": 7_919, "minimum": 7_920, "maximum": 15_837,
    })  # fmt: skip
    yield schema("no multiples of many", {
        "type": "integer", "not": {"anyOf": [{"multipleOf": n} for n in range(2, 60)]},
    })  # fmt: skip
    for name, pattern in PATTERNS.items():
        yield schema(f"pattern, {name}", {"type": "string", "pattern": pattern})
    yield schema("20 patterns at once", {
        "type": "string", "allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(20)],
    })  # fmt: skip
    yield schema("patterns that exclude each other", {
        "type": "string", "pattern": "^a", "not": {"pattern": "^a"},
    })  # fmt: skip
    yield schema("a pattern with lengths", {
        "type": "string", "pattern": "^(ab|cd)*$", "minLength": 999, "maxLength": 1001,
    })  # fmt: skip
    yield schema("an unknown format", {"type": "string", "format": "no-such-format"})
    yield schema("all formats at once", {"allOf": [
        {"format": name} for name in ("date-time", "email", "uri", "uuid", "ipv4", "ipv6", "hostname")
    ]})  # fmt: skip
    yield schema("pattern properties that overlap", {
        "type": "object", "additionalProperties": False,
        "patternProperties": {f"^.{{{i}}}x": {"maximum": i} for i in range(12)},
    })  # fmt: skip


PATTERNS = {
    "repeats in repeats": "^(a+)+$",
    "repeats of alternatives": "^(a|aa|aaa)*b$",
    "counted repeats in repeats": "^((a{1,30}){1,30}){1,30}$",
    "a thousand of anything": "^.{1000}$",
    "exponential automaton": "^(a|b)*a(a|b){16}$",
    "all of Unicode, negated": "[^\\u0000-\\uFFFF]",
    "look-ahead": "^(?=a)(?!b).*$",
    "reference back": "^(a*)\\1$",
    "classes of Unicode": "^\\p{L}+\\P{Nd}*$",
    "empty class": "^[]$",
    "nothing in a repeat": "^(|a|)*$",
    "200 alternatives": "|".join(f"x{i}y*z{i}" for i in range(100)),
    "anchors inside": "a^b|$c",
    "control characters": "^[\\x00-\\x1f\"\\\\]+$",
    "surrogates": "^[\\ud800-\\udfff]$",
}  # fmt: skip


def texts() -> Iterator[Hostile]:
    yield schema("a key twice", '{"type": "string", "type": "integer"}')
    yield schema("a property twice", '{"properties": {"a": {"const": 1}, "a": {"const": 2}}}')
    yield schema("NaN", '{"minimum": NaN}')
    yield schema("half a surrogate pair", '{"const": "\\ud800"}')
    yield schema(
        "half a surrogate pair as key", '{"properties": {"\\udfff": true}, "required": ["\\udfff"]}'
    )
    yield schema(
        "a null character as key", closed(**{"\0": {"const": "\0"}, '"': True, "\\": True})
    )
    yield schema("keys that look alike", of("\u00e9", "e\u0301", "\u200b", ""))
    yield schema("keys of separators", of("\u2028\u2029", "</script>", "\ufeff"))
    yield schema("names of Python", of("__proto__", "__class__", "constructor"))
    yield schema("EBNF in names", of('" | root ::= "x', "[^a]{2}*", "#"))
    yield schema("keywords as names", of("$ref", "properties", "allOf"))
    yield schema("a byte order mark", '\ufeff{"type": "string"}')
    yield schema("behind the end", '{"type": "string"} {"type": "integer"}')
    yield schema("a number as schema", "1")
    yield schema("nothing", "")
    yield schema("only blanks", " \n\t")
    yield schema("one bracket", "{")
    yield schema("values of the wrong type", {"required": "a", "properties": [], "enum": 1})
    yield schema(
        "$schema of the wrong type", {"$schema": ["http://json-schema.org/draft-07/schema#"]}
    )
    yield schema("a long unknown keyword", {"x" * 10_000: {"$ref": "http://nowhere"}})
    yield schema("a title of 60 KB", {"title": "é" * 10_000, "type": "null"})


def others() -> Iterator[Hostile]:
    for name, pattern in PATTERNS.items():
        yield Hostile(f"regex, {name}", Grammar(GrammarKind.REGEX, pattern.strip("^$")))
    yield Hostile("regex of 1,024 groups", Grammar(GrammarKind.REGEX, "(" * 500 + "a" + ")" * 500))
    yield Hostile("regex of 1,025 characters", Grammar(GrammarKind.REGEX, "a" * 1025))
    yield Hostile("regex of repeats", Grammar(GrammarKind.REGEX, "((a{1,99}){1,99}){1,99}b{5000}"))
    yield Hostile("regex, not closed", Grammar(GrammarKind.REGEX, "(((a|b)"))
    for name, source in EBNF.items():
        yield Hostile(f"EBNF, {name}", Grammar(GrammarKind.EBNF, source))
    choices = {
        "4,096 choices": [f"option {i}" for i in range(4096)],
        "4,097 choices": [f"{i}" for i in range(4097)],
        "choices that begin alike": ["a" * i for i in range(1, 300)],
        "choices of controls": ["\0", "\x7f", "\u2028", "<|im_end|>", '"', "\\", "🤖"],
        "a choice of half a pair": ["a", "\ud800"],
        "no choices": [],
    }
    for name, options in choices.items():
        yield Hostile(name, Grammar(GrammarKind.CHOICE, json.dumps(options)))


EBNF = {
    "left recursion": 'root ::= root "a" | "b"',
    "left recursion around": 'root ::= x "a"\nx ::= y | "c"\ny ::= root | "b"',
    "only itself": "root ::= root",
    "nothing but empty": 'root ::= ""',
    "empty in a repeat": 'root ::= (a*)*\na ::= "" | "x"*',
    "ambiguous": 'root ::= a a a a a a a a\na ::= "x"* | "x"+ | "x" "x"*',
    "ambiguous recursion": 'root ::= "x" | root root',
    "endless": 'root ::= "a" root',
    "a large repeat": 'root ::= "a"{1000000}',
    "repeats in repeats": 'root ::= (("a"{1,100}){1,100}){1,100}',
    "an unknown rule": "root ::= nothing",
    "no root": 'start ::= "a"',
    "a rule twice": 'root ::= "a"\nroot ::= "b"',
    "no syntax": "root ::= ((((",
    "a null character": 'root ::= "\0"',
    "2,000 rules": "root ::= r0\n" + "\n".join(f'r{i} ::= "{i}" | r{i + 1}' for i in range(2000))
    + '\nr2000 ::= "end"',
    "doubling rules": "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(28))
    + '\nr28 ::= "a"',
    "an inverted class": "root ::= [^a]*",
    "a class of nothing": "root ::= [b-a]",
    "10,000 brackets": "root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000,
}  # fmt: skip


def filled(make: Callable[[int], Any]) -> str:
    """A schema of a kind that all but fills the default limit of bytes.

    In a few steps, for every run of the tests imports this: the size grows nearly as the number does.
    """
    limit = DEFAULT_LIMITS.max_bytes
    number = 1000 * limit // len(json.dumps(make(1000)))
    while True:
        text = json.dumps(make(number))
        if len(text) <= limit:
            return text
        number = min(number - 1, number * limit // len(text))


LARGEST: dict[str, Callable[[int], Any]] = {
    "properties": lambda n: closed(**{f"p{i}": {"type": "string"} for i in range(n)}),
    "misspelt keywords": lambda n: {"properties": {f"p{i}": {"requried": ["a"]} for i in range(n)}},
    "unknown names": lambda n: {"type": "null", **{f"additionl{i}Proprties": 1 for i in range(n)}},
    "unused references": lambda n: {"type": "null", "$defs": {f"d{i}": {"$ref": "#/x"} for i in range(n)}},
    "references to where no schemas are": lambda n: {
        "x": {f"q{i}": {} for i in range(n)}, "allOf": [{"items": {"$ref": f"#/x/q{i}"}} for i in range(n)],
    },
    "a chain of references": lambda n: {
        "$ref": "#/$defs/d0",
        "$defs": {**{f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}, f"d{n}": {"type": "null"}},
    },
    "the same value": lambda n: {"enum": ["aa"] * n},
    "values": lambda n: {"enum": [f"{i:x}" for i in range(n)]},
    "values as oneOf": lambda n: {"oneOf": [{"const": i} for i in range(n)]},
    "objects as anyOf": lambda n: {"anyOf": keyed(n)},
    "patterns with look-aheads": lambda n: {"allOf": [{"pattern": f"^(?:(?!{i}x).)*$"} for i in range(n)]},
    "pattern properties": lambda n: {"type": "object", "patternProperties": {f"^a{i}": {} for i in range(n)}},
    "a tuple": lambda n: {"items": [{"const": i} for i in range(n)], "additionalItems": False},
    "newer keywords": lambda n: {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "properties": {f"p{i}": {"const": i} for i in range(n)},
    },
}  # fmt: skip
"""Kinds of schemas that grow with a number."""


def largest() -> Iterator[Hostile]:
    for name, make in LARGEST.items():
        yield schema(f"256 KiB, {name}", filled(make))


HOSTILE = [
    *largest(), *composition(), *references(), *shapes(), *scalars(), *texts(), *others(),
]  # fmt: skip
