"""What our pipeline does not get exactly right in a collection, by cause: for whoever mends it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from benchmarks.collection import Case
from benchmarks.mask_engines import LARGE_LIMITS, instance_text, schema_text
from benchmarks.mask_outcomes import Outcome
from service.errors import GrammarError, OutputInvalid
from service.schema_compiler.api import analyse
from service.structured_output.answers import AnswerValidator
from service.types import Grammar, GrammarKind

SHOWN = 90


def misses(cases: Sequence[Case], outcomes: Sequence[Outcome]) -> str:
    """Markdown: causes with the schemas behind them, the most frequent first."""
    found: dict[str, list[str]] = defaultdict(list)
    for case, outcome in zip(cases, outcomes, strict=True):
        if outcome.exact:
            continue
        if outcome.what != "served":
            cause = f"{outcome.what} {outcome.reason}"
            found[cause].append(f"{case.name}: {outcome.seconds:.2f} s {outcome.message[:300]}")
        for number in outcome.accepts_invalid:
            keyword, where = _violation(case, number)
            told = _told(case, keyword)
            passes = "PASSES, " if number in outcome.passes_invalid else ""
            found[f"accepts invalid: {passes}{keyword}, {told}"].append(
                f"{case.name} instance {number} at {where or '/'}"
            )
        for number in outcome.rejects_valid:
            text = instance_text(case.tests[number]["data"]).encode()
            at = outcome.stopped[str(number)]
            before = text[max(0, at - SHOWN) : at].decode(errors="replace")
            after = text[at : at + 30].decode(errors="replace")
            found["rejects valid"].append(f"{case.name} instance {number}: …{before} ⟂ {after}")
        for number in outcome.loses_valid:
            if number not in outcome.rejects_valid:
                keyword, where = _violation(case, number)
                found[f"final validation loses valid: {keyword}"].append(
                    f"{case.name} instance {number} at {where}"
                )
    lines = []
    for cause, entries in sorted(found.items(), key=lambda item: -len(item[1])):
        lines += [f"\n## {cause}: {len(entries)}\n", *(f"- {entry}" for entry in entries)]
    return "\n".join(lines) + "\n"


def _violation(case: Case, number: int) -> tuple[str, str]:
    """Keyword and place of the first violation of an instance."""
    text = instance_text(case.tests[number]["data"])
    try:
        AnswerValidator(schema_text(case.schema), LARGE_LIMITS).parse(text)
    except OutputInvalid as error:
        return error.metadata["keyword"], error.metadata["pointer"]
    except GrammarError as error:
        return error.reason, ""
    return "nothing", ""


def _told(case: Case, keyword: str) -> str:
    """What the report says of a keyword, as far as one word can say it."""
    asked = Grammar(GrammarKind.JSON_SCHEMA, schema_text(case.schema), lengths_beside=True)
    checked = analyse(asked, LARGE_LIMITS).report.checked
    whys = sorted({entry.why for entry in checked if entry.keyword == keyword})
    if whys:
        return "CHECKED because it " + " / ".join(whys)
    others = sorted({entry.keyword for entry in checked})
    return f"not CHECKED itself, but {', '.join(others)}" if others else "said to be ENFORCED"
