"""The validators of the JSON Schema drafts, with bounded work.

They are the ones of ``jsonschema``, except that every keyword first asks the budget (a few
``$ref``s under ``allOf`` are enough for exponential work), that patterns run in linear time,
that ``uniqueItems`` does, too, that what is evaluated is found in bounded time, that ``format`` is
asserted, that a violation of the schema ``false`` has its place, and that each subschema has its own
base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jsonschema
from jsonschema import ValidationError, validators
from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]
from referencing import Registry
from referencing import jsonschema as specifications

from service.tasks import budget
from service.tasks.evaluated import unevaluated_items, unevaluated_properties
from service.tasks.formats import FORMATS
from service.tasks.regexes import found

Keyword = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft of JSON Schema: its validator for answers, and the validator of its metaschema.

    foreign: keywords that assert something in another draft, and nothing in this one.
    """

    name: str
    uri: str
    validator: Any
    metaschema: Any
    specification: Any
    foreign: frozenset[str]


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


_OWN: dict[str, Keyword] = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
    "unevaluatedProperties": unevaluated_properties,
    "unevaluatedItems": unevaluated_items,
    "uniqueItems": _unique_items,
    "format": _format,
}
_DEPENDENCIES: Keyword = jsonschema.Draft7Validator.VALIDATORS["dependencies"]
"""The later drafts have split it up, but their metaschemas keep it, and schemas use it."""


def _bounded(keyword: Keyword) -> Keyword:
    def check(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        budget.current().check()
        return keyword(validator, value, instance, schema)

    return check


def _placed(descend: Keyword) -> Keyword:
    """``descend`` of the library, which leaves out the path where the subschema is ``false``."""

    def placed(
        validator: Any,
        instance: Any,
        schema: Any,
        path: Any = None,
        schema_path: Any = None,
        resolver: Any = None,
    ) -> Iterator[ValidationError]:
        for error in descend(validator, instance, schema, path, schema_path, resolver):
            if schema is False and path is not None:
                error.path.appendleft(path)
            yield error

    return placed


def _based(evolve: Keyword, specification: Any) -> Keyword:
    """``evolve`` of the library, where ``not``, ``if``, ``contains`` and ``oneOf`` go on with the base
    of the schema outside, also where theirs has an ``$id``."""

    def based(validator: Any, **changes: Any) -> Any:
        if "schema" in changes and "_resolver" not in changes:
            inner = specification.create_resource(changes["schema"])
            changes["_resolver"] = validator._resolver.in_subresource(inner)
        return evolve(validator, **changes)

    return based


def _bare_metaschemas() -> Any:
    """The metaschemas without their ``$schema``, at which the library would go on with its own
    validator."""
    resources = []
    for uri in REGISTRY:
        contents = dict(REGISTRY[uri].contents)
        specification = specifications.specification_with(contents.pop("$schema"))
        resources.append((uri, specification.create_resource(contents)))
    return Registry().with_resources(resources).crawl()


_METASCHEMAS = _bare_metaschemas()


def _extended(base: Any, keywords: dict[str, Keyword], specification: Any) -> Any:
    bounded = {name: _bounded(_OWN.get(name, keyword)) for name, keyword in keywords.items()}
    extended: Any = validators.extend(base, bounded)  # type: ignore[no-untyped-call]
    extended.descend = _placed(base.descend)
    extended.evolve = _based(base.evolve, specification)
    return extended


_BASES = (
    jsonschema.Draft202012Validator,
    jsonschema.Draft201909Validator,
    jsonschema.Draft7Validator,
    jsonschema.Draft6Validator,
    jsonschema.Draft4Validator,
)
_COUNTS = frozenset(("minContains", "maxContains"))
"""Keywords that the library reads inside ``contains``."""
_EVERYWHERE = frozenset(("additionalItems", "exclusiveMinimum", "exclusiveMaximum"))
"""Keywords whose form differs between drafts, so that the metaschema refuses the wrong one."""


def _foreign(keywords: dict[str, Keyword]) -> frozenset[str]:
    known = _COUNTS.union(*(base.VALIDATORS for base in _BASES))
    counted = _COUNTS if "unevaluatedItems" in keywords else frozenset[str]()
    return known.difference(keywords, counted, _EVERYWHERE)


def _draft(name: str, base: Any, specification: Any) -> Draft:
    keywords = {"dependencies": _DEPENDENCIES, **base.VALIDATORS}
    uri = base.ID_OF(base.META_SCHEMA)
    # What a metaschema says of formats is not asserted: references and patterns have checks of
    # their own, which say more.
    unformatted = {name: k for name, k in keywords.items() if name != "format"}
    metaschema = _extended(base, unformatted, specification)
    return Draft(
        name=name,
        uri=uri.rstrip("#"),
        validator=_extended(base, keywords, specification),
        metaschema=metaschema(_METASCHEMAS[uri].contents, registry=_METASCHEMAS),
        specification=specification,
        foreign=_foreign(keywords),
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
DEFAULT_DRAFT = _ALL[0]
