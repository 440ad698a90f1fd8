"""The drafts of JSON Schema: what their keywords mean, and validators with bounded work.

They are the ones of ``jsonschema``, except that every keyword first asks the budget (a few
``$ref``s under ``allOf`` are enough for exponential work), that patterns run in linear time,
that ``uniqueItems`` does, too, that what is evaluated is found in bounded time, that ``format`` is
asserted, that a violation of the schema ``false`` has its place, that each subschema has its own
base, and that numbers are exact decimals.

Every draft has the keywords of the later ones, too: an author who writes ``const`` in a schema of
draft-04 means it. Both forms of ``items`` and of ``exclusiveMinimum`` are understood everywhere;
which of them a schema may use is up to the metaschema of its draft.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import jsonschema
from jsonschema import ValidationError, validators
from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]
from referencing import Registry, Specification
from referencing import jsonschema as specifications

from service.schema_compiler import budget
from service.schema_compiler.exact import Number, is_multiple, is_whole
from service.schema_compiler.frontend.formats import FORMATS
from service.schema_compiler.frontend.unevaluated import unevaluated_items, unevaluated_properties
from service.schema_compiler.regex.matching import found

Keyword = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft of JSON Schema: its validator for answers, and the validator of its metaschema.

    newer: keywords of later drafts, which take effect in this one, too. foreign: keywords of other
    drafts that need what this one does not have. ignores_siblings: beside ``$ref`` nothing counts.
    older_forms: keywords may have forms of earlier drafts, too.
    """

    name: str
    uri: str
    validator: Any
    metaschema: Any
    specification: Any
    newer: frozenset[str]
    foreign: frozenset[str]
    ignores_siblings: bool
    older_forms: bool
    known: frozenset[str] = field(init=False)
    """Keywords that have a meaning by themselves."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", frozenset(self.validator.VALIDATORS))

    def of(self, schema: Any) -> Any:
        """The validator of a schema, which finds references within it alone."""
        resolver = Registry().resolver_with_root(self.specification.create_resource(schema))
        return self.validator(schema, registry=Registry(), _resolver=resolver)

    def meaning(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords of a subschema that assert something where they stand."""
        if self.ignores_siblings and schema.get("$ref") is not None:
            return {"$ref": schema["$ref"]}
        found = {k: v for k, v in schema.items() if k in self.known}
        for keyword, reader in _READ_BY.items():
            if keyword in schema and reader in found:
                found[keyword] = schema[keyword]
        if not isinstance(schema.get("items"), list):
            found.pop("additionalItems", None)
        return found


_READ_BY = {"then": "if", "else": "if", "minContains": "contains", "maxContains": "contains"}
"""Keywords that another one reads, without which they say nothing."""
ASSERTING = frozenset(_READ_BY).union(
    jsonschema.Draft202012Validator.VALIDATORS,
    jsonschema.Draft201909Validator.VALIDATORS,
    jsonschema.Draft7Validator.VALIDATORS,
)
"""Keywords that can constrain a value in some draft."""


def _multiple_of(
    validator: Any, value: Number, instance: Any, schema: Any
) -> Iterator[ValidationError]:
    if validator.is_type(instance, "number") and not is_multiple(instance, value):
        yield ValidationError("is not a multiple")


def _pattern(validator: Any, value: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "string") and not found(value, instance):
        yield ValidationError("does not match the pattern")


def _pattern_properties(
    validator: Any, value: dict[str, Any], instance: Any, schema: Any
) -> Iterator[ValidationError]:
    if not validator.is_type(instance, "object"):
        return
    for pattern, subschema in value.items():
        for key, member in instance.items():
            if found(pattern, key):
                yield from validator.descend(member, subschema, path=key, schema_path=pattern)


def _additional_properties(
    validator: Any, value: Any, instance: Any, schema: dict[str, Any]
) -> Iterator[ValidationError]:
    if not validator.is_type(instance, "object"):
        return
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for key, member in instance.items():
        if key in named or any(found(pattern, key) for pattern in patterns):
            continue
        if value is False:
            yield ValidationError("has a property that is not allowed", path=[key])
        else:
            yield from validator.descend(member, value, path=key)


def _unique_items(
    validator: Any, value: bool, instance: Any, schema: Any
) -> Iterator[ValidationError]:
    if not value or not validator.is_type(instance, "array"):
        return
    if len({frozen(item) for item in instance}) != len(instance):
        yield ValidationError("has items that are equal")


def frozen(value: Any) -> Any:
    """A hashable stand-in that is equal exactly where JSON Schema says equal: 1 and 1.0 are, 1
    and true are not."""
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, dict):
        return ("object", frozenset((key, frozen(member)) for key, member in value.items()))
    if isinstance(value, list):
        return ("array", tuple(frozen(item) for item in value))
    return value


def _format(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    known = FORMATS.get(value) if isinstance(value, str) else None
    if known is not None and validator.is_type(instance, "string") and not known(instance):
        yield ValidationError(f"is not of the format {value}")


def _type(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
    """The library's, without its loop where there is one name and the value is of that type."""
    if isinstance(value, str) and validator.is_type(instance, value):
        return ()
    return jsonschema.Draft202012Validator.VALIDATORS["type"](validator, value, instance, schema)


def _items(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """A list is for the first items; else, what comes behind ``prefixItems``."""
    if not validator.is_type(instance, "array"):
        return
    if isinstance(value, list):
        for place, (item, subschema) in enumerate(zip(instance, value, strict=False)):
            yield from validator.descend(item, subschema, path=place, schema_path=place)
        return
    first = len(schema.get("prefixItems", ()))
    for place in range(first, len(instance)):
        yield from validator.descend(instance[place], value, path=place)


def _additional_items(
    validator: Any, value: Any, instance: Any, schema: Any
) -> Iterator[ValidationError]:
    first = schema.get("items")
    if isinstance(first, list) and validator.is_type(instance, "array"):
        for place in range(len(first), len(instance)):
            yield from validator.descend(instance[place], value, path=place)


def _bound(keyword: str, exclusive: str) -> dict[str, Keyword]:
    """The keywords of a bound of numbers, where the exclusive one may be a boolean, as in draft-04."""
    known = jsonschema.Draft202012Validator.VALIDATORS

    def bound(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        strict = schema.get(exclusive) is True
        return known[exclusive if strict else keyword](validator, value, instance, schema)

    def exclusive_bound(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        if isinstance(value, bool):
            return ()
        return known[exclusive](validator, value, instance, schema)

    return {keyword: bound, exclusive: exclusive_bound}


_OWN: dict[str, Keyword] = {
    "multipleOf": _multiple_of,
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
    "unevaluatedProperties": unevaluated_properties,
    "unevaluatedItems": unevaluated_items,
    "uniqueItems": _unique_items,
    "format": _format,
    "type": _type,
    "items": _items,
    "additionalItems": _additional_items,
    **_bound("minimum", "exclusiveMinimum"),
    **_bound("maximum", "exclusiveMaximum"),
}
_DYNAMIC = frozenset(("$dynamicRef", "$recursiveRef"))
"""Keywords that need anchors of their own draft."""
_EVERYWHERE: dict[str, Keyword] = {
    **jsonschema.Draft7Validator.VALIDATORS,  # dependencies, which the later drafts have split up
    **jsonschema.Draft202012Validator.VALIDATORS,
}


def _bounded(keyword: Keyword) -> Keyword:
    def check(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        budget.current().check()
        return keyword(validator, value, instance, schema)

    return check


_LEAF = frozenset(
    (
        *("title", "description", "type", "enum", "const", "format", "pattern"),
        *("minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        *("multipleOf", "required", "minItems", "maxItems", "minProperties", "maxProperties"),
    )
)
"""Keywords that say nothing of subschemas, so that they ask a validator for types alone."""
_LIST = _LEAF | {"items"}


def _placed(descend: Keyword) -> Keyword:
    """``descend`` of the library, which leaves out the path where the subschema is ``false``, and which
    makes a validator for each subschema. Most subschemas have leaf keywords alone, or are lists of such
    items. For those the validator of the schema outside does: to make one takes longer than all their
    checks, and answers wait for it."""

    def placed(
        validator: Any,
        instance: Any,
        schema: Any,
        path: Any = None,
        schema_path: Any = None,
        resolver: Any = None,
    ) -> Iterator[ValidationError]:
        if _is_simple(schema) and _is_valid(validator, instance, schema):
            return
        for error in descend(validator, instance, schema, path, schema_path, resolver):
            if schema is False and path is not None:
                error.path.appendleft(path)
            yield error

    return placed


def _is_simple(schema: Any) -> bool:
    """Whether a schema has leaf keywords alone, or is one of a list whose items have. Not of lists in
    lists: each level would check a violation twice."""
    if not isinstance(schema, dict):
        return False
    if schema.keys() <= _LEAF:
        return True
    items = schema.get("items")
    return schema.keys() <= _LIST and isinstance(items, dict) and items.keys() <= _LEAF


def _is_valid(validator: Any, instance: Any, schema: dict[str, Any]) -> bool:
    """Whether no keyword of a simple schema is violated."""
    keywords = validator.VALIDATORS
    for name, value in schema.items():
        keyword = keywords.get(name)
        if keyword is not None:
            for _ in keyword(validator, value, instance, schema) or ():
                return False
    return True


def _based(evolve: Keyword, specification: Any) -> Keyword:
    """``evolve`` of the library, where ``not``, ``if``, ``contains`` and ``oneOf`` go on with the base
    of the schema outside, also where theirs has an ``$id``."""

    def based(validator: Any, **changes: Any) -> Any:
        schema = changes.get("schema")
        # Not of booleans: draft-04 knows none, and would look for an ``id`` in them.
        if isinstance(schema, Mapping) and "_resolver" not in changes:
            inner = specification.create_resource(schema)
            changes["_resolver"] = validator._resolver.in_subresource(inner)
        return evolve(validator, **changes)

    return based


_SCHEMA: dict[str, Any] = {"$ref": "#"}
_SIZE = {"type": "integer", "minimum": 0}
_NAMES = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
_SCHEMAS = {"type": "array", "items": _SCHEMA, "minItems": 1}
_NEWER: dict[str, Any] = {
    "const": {},
    **dict.fromkeys(("contains", "propertyNames", "if", "then", "else"), _SCHEMA),
    **dict.fromkeys(("unevaluatedProperties", "unevaluatedItems"), _SCHEMA),
    **dict.fromkeys(("minContains", "maxContains"), _SIZE),
    "dependentRequired": {"type": "object", "additionalProperties": _NAMES},
    "dependentSchemas": {"type": "object", "additionalProperties": _SCHEMA},
    "prefixItems": _SCHEMAS,
}
"""What the metaschemas of draft-04 to draft-07 do not say of keywords of later drafts."""
_ENUM = {"type": "array", "minItems": 1}
"""Without ``uniqueItems``: a value that is listed twice is one of the values all the same."""
_BOUND = {"type": ["number", "boolean"]}
_BOUNDS = {"exclusiveMinimum": _BOUND, "exclusiveMaximum": _BOUND}
_DRAFT_04 = {**_BOUNDS, "enum": _ENUM, "required": _NAMES}
_LISTS_2019 = {"prefixItems": {"$ref": "#/$defs/schemaArray"}}
_LISTS_2020 = {
    "items": {"anyOf": [{"$dynamicRef": "#meta"}, {"$ref": "#/$defs/schemaArray"}]},
    "additionalItems": {"$dynamicRef": "#meta"},
}
_ADDED: dict[str, Any] = {
    "http://json-schema.org/draft-04/schema": {**_NEWER, **_DRAFT_04},
    "http://json-schema.org/draft-06/schema": {**_NEWER, "enum": _ENUM},
    "http://json-schema.org/draft-07/schema": _NEWER,
    "https://json-schema.org/draft/2019-09/meta/applicator": _LISTS_2019,
}
"""Keywords by metaschema that are allowed, or have other values, than it says."""
_ADDED_UNNAMED: dict[str, Any] = {
    "https://json-schema.org/draft/2020-12/meta/applicator": _LISTS_2020,
    "https://json-schema.org/draft/2020-12/meta/validation": _BOUNDS,
}
"""The same for schemas that name no draft: the forms of earlier ones."""


def _metaschemas(added: dict[str, Any]) -> Any:
    """The metaschemas with other keywords, and without their ``$schema``, at which the library would
    go on with its own validator."""
    resources = []
    for uri in REGISTRY:
        contents = dict(REGISTRY[uri].contents)
        specification = specifications.specification_with(contents.pop("$schema"))
        if uri in added:
            contents["properties"] = contents["properties"] | added[uri]
        if specification is specifications.DRAFT4:
            contents["type"] = ["object", "boolean"]
            del contents["dependencies"]  # the walk says more of a boolean without its bound
        resources.append((uri, specification.create_resource(contents)))
    return Registry().with_resources(resources).crawl()


def _exact_types(checker: Any) -> Any:
    """The types of a draft, for ``Decimal`` in place of ``float``; it is a number for the library."""
    if not checker.is_type(1.0, "integer"):  # draft-04 wants integers without a point
        return checker

    def is_integer(_: Any, instance: Any) -> bool:
        whole = isinstance(instance, Decimal) and is_whole(instance)
        return whole or bool(checker.is_type(instance, "integer"))

    return checker.redefine("integer", is_integer)


def _extended(base: Any, keywords: dict[str, Keyword], specification: Any) -> Any:
    bounded = {name: _bounded(_OWN.get(name, keyword)) for name, keyword in keywords.items()}
    checker = _exact_types(base.TYPE_CHECKER)
    extended: Any = validators.extend(base, bounded, type_checker=checker)  # type: ignore[no-untyped-call]
    extended.descend = _placed(base.descend)
    extended.evolve = _based(base.evolve, specification)
    return extended


def _tolerant(specification: Any) -> Any:
    """A specification for schemas with the forms of other drafts: a list as ``items`` of a draft that
    has ``prefixItems``, booleans in draft-04. The library fails on them when it looks for anchors, and
    on a property that has the name ``id``, when a reference leads through its siblings."""
    keyword = "id" if specification is specifications.DRAFT4 else "$id"

    def identifier(contents: Any) -> Any:
        # Of a map of schemas, this is one of them.
        is_map = isinstance(contents, Mapping) and not isinstance(contents.get(keyword, ""), str)
        return None if is_map else specification.id_of(contents)

    def subresources(contents: Any) -> Iterator[Any]:
        for one in specification.subresources_of(contents):
            yield from (part for part in _listed(one) if isinstance(part, Mapping))

    make: Any = Specification  # mypy does not see its arguments
    return make(
        name=specification.name,
        id_of=identifier,
        subresources_of=subresources,
        anchors_in=lambda _, contents: specification.anchors_in(contents),
        maybe_in_subresource=specification.maybe_in_subresource,
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _draft(name: str, base: Any, specification: Any, *, added: dict[str, Any] = _ADDED) -> Draft:
    own = base.VALIDATORS
    keywords = {k: _EVERYWHERE[k] for k in _EVERYWHERE if k not in _DYNAMIC} | {
        k: own[k] for k in own if k in _DYNAMIC
    }
    uri = base.ID_OF(base.META_SCHEMA)
    # What a metaschema says of formats is not asserted: references and patterns have checks of
    # their own, which say more.
    unformatted = {name: k for name, k in keywords.items() if name != "format"}
    metaschema = _extended(base, unformatted, specification)
    registry = _metaschemas(added)
    counts = {"minContains", "maxContains"} if "unevaluatedItems" in own else set()
    branches = {"then", "else"} if "if" in own else set()
    older = {"dependencies", "additionalItems", "exclusiveMinimum", "exclusiveMaximum"}
    return Draft(
        name=name,
        uri=uri.rstrip("#"),
        validator=_extended(base, keywords, specification),
        metaschema=metaschema(registry[uri].contents, registry=registry),
        specification=_tolerant(specification),
        newer=ASSERTING.difference(own, counts, branches, older, _DYNAMIC),
        foreign=_DYNAMIC.difference(own),
        ignores_siblings=name in ("draft-04", "draft-06", "draft-07"),
        older_forms=added is _ADDED_UNNAMED,
    )


_ALL = (
    _draft("2020-12", jsonschema.Draft202012Validator, specifications.DRAFT202012),
    _draft("2019-09", jsonschema.Draft201909Validator, specifications.DRAFT201909),
    _draft("draft-07", jsonschema.Draft7Validator, specifications.DRAFT7),
    _draft("draft-06", jsonschema.Draft6Validator, specifications.DRAFT6),
    _draft("draft-04", jsonschema.Draft4Validator, specifications.DRAFT4),
)
DRAFTS: dict[str, Draft] = {draft.uri: draft for draft in _ALL}
"""The drafts by the value of ``$schema`` without a trailing ``#``."""
DEFAULT_DRAFT = _draft(
    "2020-12",
    jsonschema.Draft202012Validator,
    specifications.DRAFT202012,
    added=_ADDED_UNNAMED,
)
"""Of schemas that name no draft: the latest, which also takes lists as ``items`` and booleans as
``exclusiveMinimum``, as the earlier ones do."""

_NAME = re.compile(
    r"(?:https?:)?(?://)?(?:www\.)?json-schema\.org/(?:draft[-/]?(0?[4-7]|2019-09|2020-12)/)?"
    r"(?:hyper-)?schema(?:\.json)?/?#?/?",
    re.IGNORECASE,
)
_BY_NUMBER = {
    **dict(zip(("2020-12", "2019-09", "7", "6", "4"), _ALL, strict=True)),
    "5": _ALL[-1],  # which differs from draft-04 in its text alone
    "": DEFAULT_DRAFT,
}


def draft_named(name: Any) -> Draft | None:
    """The draft that a ``$schema`` names, in any of the spellings in use; None where it is unknown."""
    found = _NAME.fullmatch(name.strip()) if isinstance(name, str) else None
    return _BY_NUMBER[(found[1] or "").lstrip("0")] if found else None
