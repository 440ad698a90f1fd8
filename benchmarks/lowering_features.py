"""What each feature of the schema compiler is worth: it is switched off, and what depended on it is counted.

``python -m benchmarks.lowering_features [--schemas FILE.jsonl] [--every N]``. Without a feature, the
keywords that needed it degrade to CHECKED. Only schemas whose grammar changes are compiled and judged
anew. The collection is joined by the keyword cases of the drafts and, where they are, the schemas of
``../shared/cases``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.collection import Case, collection_argument, read_collection
from benchmarks.common import markdown, write_results
from benchmarks.mask_engines import LARGE_LIMITS, Ours, instance_text, schema_text
from service.errors import ServiceError
from service.schema_compiler import api
from service.schema_compiler.lower import (
    additional_names,
    arrays,
    context,
    multiples,
    number_constraints,
    objects,
    string_constraints,
    string_patterns,
)
from service.schema_compiler.normalize import alternatives, expand
from service.schema_compiler.report import Enforcement
from service.types import Grammar, GrammarKind, PropertyOrder
from tests.service.schema_compiler.cases import CASES

SHARED_CASES = Path(__file__).parents[2] / "shared" / "cases" / "schemas"


def _no_overlaps(combiner: Any, branches: Sequence[Any], pointer: str) -> set[tuple[int, int]]:
    if len(branches) > 1:
        combiner._drop(pointer, "switched off")
    return set()


Patch = tuple[Any, str, Any]
FEATURES: dict[str, list[Patch]] = {
    "patterns as automata": [(string_patterns, "_fitted", lambda *_: None)],
    "patterns as expressions": [(string_patterns, "_direct", lambda *_: None)],
    "formats": [(string_constraints, "FORMAT_PATTERNS", {})],
    "lengths of strings up to 64": [
        (string_constraints, "MAX_COUNTED", 0),
        (string_patterns, "MAX_COUNTED", 0),
    ],
    "multiples of integers": [(multiples, "_MAX_RAW", 0)],
    "multiples of fractions": [(number_constraints, "MAX_PLACES", 0)],
    "names that extend declared ones": [
        (additional_names, "MAX_LONGER", -1),
        (additional_names, "MAX_LONGER_BY_PATTERN", -1),
    ],
    "names that match several patterns": [(additional_names, "MAX_PATTERNS", 0)],
    "patterns that list names": [(objects, "listed_names", lambda _: [])],
    "number of properties": [(objects, "MAX_RULES", 0)],
    "properties asked for by negation": [(objects, "MAX_OBLIGATIONS", 0)],
    "contains": [(arrays, "MAX_RULES", 0)],
    "uniqueItems out of five values": [(arrays, "MAX_DISTINCT", -1)],
    "overlaps of oneOf": [(alternatives.Combiner, "overlaps", _no_overlaps)],
    "unevaluatedProperties": [(expand, "unclear", lambda _: True)],
    "absorbed alternatives": [(alternatives, "MAX_ABSORBED", 0)],
}
"""By name, what is replaced to switch a feature off."""


@dataclass(frozen=True)
class Found:
    """The grammar of a schema, and the number of keywords that only validation checks."""

    ebnf: str
    checked: int
    enforced: bool


class Judge:
    """Compiles grammars over single bytes and follows instances."""

    def __init__(self) -> None:
        self._ours = Ours(LARGE_LIMITS, PropertyOrder.DECLARED)

    def exact(self, case: Case, found: Found) -> bool:
        grammar = Grammar(GrammarKind.JSON_SCHEMA, schema_text(case.schema), found.ebnf)
        try:
            following = self._ours.following(grammar)
        except ServiceError:
            return False
        texts = ((instance_text(test["data"]), test["valid"]) for test in case.tests)
        return all(following.follow(text).accepted == valid for text, valid in texts)


def analysed(case: Case) -> Found | None:
    try:
        found = api.compile_schema(schema_text(case.schema), LARGE_LIMITS)
    except ServiceError:
        return None
    enforced = found.report.enforcement is Enforcement.ENFORCED
    return Found(found.grammar, len(found.report.checked), enforced)


@contextlib.contextmanager
def without(feature: str) -> Iterator[None]:
    """Switch a feature off, and forget what was cached with it."""
    with contextlib.ExitStack() as stack:
        _forget()
        for target, name, value in FEATURES[feature]:
            stack.enter_context(mock.patch.object(target, name, value))
        yield
    _forget()


def _forget() -> None:
    api._CACHE.clear()
    context._numbers.clear()
    for function in (string_patterns._solved, string_patterns._read, multiples.multiples):
        function.cache_clear()
    for function in (string_patterns._fitted, string_patterns._direct):
        function.cache_clear()


def compared(
    feature: str, cases: list[Case], before: list[Found | None], judge: Judge
) -> dict[str, Any]:
    """The row of a feature."""
    changed = exact_lost = exact_won = enforced_lost = keywords_lost = 0
    with without(feature):
        after = [analysed(case) for case in cases]
    for case, old, new in zip(cases, before, after, strict=True):
        if old is None or new is None:
            changed += old is not new
            continue
        keywords_lost += new.checked - old.checked
        enforced_lost += old.enforced and not new.enforced
        if old.ebnf != new.ebnf:
            changed += 1
            was, is_ = judge.exact(case, old), judge.exact(case, new)
            exact_lost += was and not is_
            exact_won += is_ and not was
    return {
        "without": feature,
        "grammars changed": changed,
        "exact lost": exact_lost,
        "exact won": exact_won,
        "ENFORCED schemas lost": enforced_lost,
        "keywords no longer enforced": keywords_lost,
    }


def keyword_cases() -> Iterator[Case]:
    for number, one in enumerate(CASES):
        tests = [{"valid": True, "data": data} for data in one.fits]
        tests += [{"valid": False, "data": data} for data in one.not_fits]
        for draft in one.drafts:
            schema = (
                {"$schema": draft, **one.schema} if isinstance(one.schema, dict) else one.schema
            )
            yield Case(f"{number} {one.keyword} {draft}", schema, tests)


def shared_cases() -> Iterator[Case]:
    for path in sorted(SHARED_CASES.rglob("*.json")):
        with contextlib.suppress(ValueError):
            yield Case(path.name, json.loads(path.read_text()), [])


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lowering_features")
    collection_argument(parser)
    parser.add_argument("--every", type=int, default=1, help="only every so manyth schema")
    arguments = parser.parse_args(words)
    cases = (read_collection(arguments.schemas) or [])[:: arguments.every]
    cases += [*keyword_cases(), *shared_cases()][:: arguments.every]
    for case in cases[:20]:
        analysed(case)
    before = [analysed(case) for case in cases]
    judge = Judge()
    rows = []
    for feature in FEATURES:
        rows.append(compared(feature, cases, before, judge))
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    notes = f"{len(cases)} schemas; " + (__doc__ or "").splitlines()[0]
    print(markdown(rows))
    print(write_results("lowering_features", rows, notes))


if __name__ == "__main__":
    main()
