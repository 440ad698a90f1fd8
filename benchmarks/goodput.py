"""What constraints cost a model: how many calls end OK, and right answers with a grammar and without.

``python -m benchmarks goodput``. The bundled model answers what it was trained on, about drawings that it has
never seen, through a real server: every kind of question and the image analysis, greedily, without a
grammar and under every kind of grammar and option. Goodput is the share of calls that end OK. The tax is
how many more of the same answers, per hundred, are right without a grammar.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grpc

from benchmarks.common import markdown, write_results
from benchmarks.targets import UNTRAINED
from examples.drawings.analysis import analysis
from examples.drawings.evaluate import encoded_drawing, facts_for, serving
from examples.drawings.questions import QUESTIONS, Schema, ask
from examples.drawings.scenes import HELD_OUT_SEED, scene
from service.client import read_error
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.tasks.image_analysis import IMAGE_ANALYSIS
from service.types import Grammar, GrammarKind
from service.wiring import BUNDLED_MODEL

DRAWINGS = 32
QUICK_DRAWINGS = 1
CALLERS = 8
MOST_CHOICES = 100
"""Answers of a question that are sent as a choice."""
NO_GRAMMAR = "none"
NOTES = (
    "The bundled model on the reference engine, {drawings} drawings, {questions} kinds of questions with the image "
    "analysis, greedy, through a gRPC server; a choice only where there are at most {choices} answers. OK: calls "
    "without an error. right, without: of the same calls without a grammar, whose text counts where it is the right "
    "JSON or word. tax: points between the two. The model was trained without a schema in its prompt, so that the "
    "row with one says nothing about models that read schemas; it counts for goodput alone."
)


@dataclass(frozen=True)
class Ask:
    """A question about one drawing. schema: of the answer; None for one of ``choices``. answer: the right
    one, as JSON or as a word. system: empty for the default."""

    name: str
    images: tuple[bytes, ...]
    user: str
    answer: str
    schema: Schema | None
    choices: tuple[str, ...] = ()
    system: str = ""

    def is_right(self, text: str) -> bool:
        """Whether the text of a model says the same as the right answer."""
        if self.schema is None:
            return text.strip() == self.answer
        try:
            return bool(json.loads(text) == json.loads(self.answer))
        except ValueError:
            return False


Constrain = Callable[[Ask], pb.Grammar | None]
"""The grammar of a question; None where this kind of grammar cannot say what the answers are."""


def _schema(
    change: Callable[[Schema], Schema] = lambda schema: schema, **options: Any
) -> Constrain:
    def constrain(one: Ask) -> pb.Grammar | None:
        if one.schema is None:
            return None
        return pb.Grammar(json_schema=json.dumps(change(one.schema)), **options)

    return constrain


def opened(schema: Any) -> Any:
    """A schema whose objects say nothing of additional properties."""
    if isinstance(schema, dict):
        return {k: opened(v) for k, v in schema.items() if k != "additionalProperties"}
    return [opened(one) for one in schema] if isinstance(schema, list) else schema


def _regex(one: Ask) -> pb.Grammar:
    text = "|".join(map(re.escape, one.choices)) if one.schema is None else regex(one.schema)
    return pb.Grammar(regex=text)


def regex(schema: Schema) -> str:
    """The expression for the answers of a schema, as ``json.dumps`` writes them. Only what the questions
    use is known."""
    if "enum" in schema:
        return "(" + "|".join(re.escape(json.dumps(one)) for one in schema["enum"]) + ")"
    kind = schema["type"]
    if kind == "object":
        pairs = (f'"{name}": {regex(one)}' for name, one in schema["properties"].items())
        return r"\{" + ", ".join(pairs) + r"\}"
    if kind == "array":
        item, least = regex(schema["items"]), schema.get("minItems", 0)
        times = f"{{{max(least - 1, 0)},{schema['maxItems'] - 1}}}" if "maxItems" in schema else "*"
        some = f"{item}(, {item}){times}"
        return rf"\[{some if least else f'({some})?'}\]"
    if kind == "integer":
        return f"[{schema['minimum']}-{schema['maximum']}]"
    return {"boolean": "(true|false)", "string": r'"[^"\\\x00-\x1f]*"'}[kind]


def _choice(one: Ask) -> pb.Grammar | None:
    found = one.choices if one.schema is None else choices(one.schema)
    return None if found is None else pb.Grammar(choice=pb.Choice(options=found))


def choices(schema: Schema) -> tuple[str, ...] | None:
    """All answers of a schema as JSON; None where they are not few."""
    values = _values(schema)
    if values is None:
        return None
    some = tuple(json.dumps(one) for one in itertools.islice(values, MOST_CHOICES + 1))
    return some if len(some) <= MOST_CHOICES else None


def _values(schema: Schema) -> Iterator[Any] | None:
    if "enum" in schema:
        return iter(list(schema["enum"]))
    kind = schema["type"]
    if kind == "integer":
        return iter(range(schema["minimum"], schema["maximum"] + 1))
    if kind == "boolean":
        return iter((True, False))
    if kind != "object":
        return None
    members = [_values(one) for one in schema["properties"].values()]
    known = [one for one in members if one is not None]
    if len(known) < len(members):
        return None
    names = list(schema["properties"])
    return (dict(zip(names, one, strict=True)) for one in itertools.product(*known))


def _ebnf(one: Ask) -> pb.Grammar | None:
    if one.schema is None:
        listed = " | ".join(map(json.dumps, one.choices))
        return pb.Grammar(ebnf=f"root ::= {listed}\n")
    return pb.Grammar(ebnf=_ebnf_of(json.dumps(one.schema)))


@lru_cache
def _ebnf_of(schema: str) -> str:
    return analyse(Grammar(GrammarKind.JSON_SCHEMA, schema), DEFAULT_LIMITS).grammar.ebnf


ANY_ORDER = pb.PROPERTY_ORDER_ANY
VARIANTS: dict[str, tuple[Constrain, dict[str, Any]]] = {
    NO_GRAMMAR: (lambda one: None, {}),
    "json_schema": (_schema(), {}),
    "json_schema, open objects": (_schema(opened), {}),
    "json_schema, open objects, close_objects": (_schema(opened, close_objects=True), {}),
    "json_schema, property_order any": (_schema(property_order=ANY_ORDER), {}),
    UNTRAINED: (_schema(), {"schema_in_prompt": True}),
    "regex": (_regex, {}),
    "ebnf": (_ebnf, {}),
    "choice": (_choice, {}),
}  # fmt: skip
"""The grammar of each question, and more fields of the task."""


def asks(drawings: int) -> list[Ask]:
    """Every kind of question about so many held-out drawings, and the image analysis of each."""
    found = []
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + drawings):
        rng = random.Random(f"question {seed}")
        for question in QUESTIONS:
            frames, facts = facts_for(question.name, question.images, seed)
            one = ask(question, facts, rng)
            images = tuple(encoded_drawing(frame, look) for frame, look in frames)
            found.append(
                Ask(
                    question.name, images, one.prompt, one.answer, question.schema, question.choices
                )
            )
        found.append(_analysis(seed))
    return found


def _analysis(seed: int) -> Ask:
    task, facts = IMAGE_ANALYSIS, scene(seed)
    assert task.grammar is not None
    assert isinstance(task.user, str)
    return Ask(
        "analysis", (encoded_drawing(facts, seed),), task.user, json.dumps(analysis(facts)),
        json.loads(task.grammar.source), system=task.system or "",
    )  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What came of a call. reason: OK or that of the error."""

    number: int
    reason: str
    is_right: bool


async def answered(
    stub: Any, questions: Sequence[Ask], constrain: Constrain, fields: dict[str, Any]
) -> list[Result]:
    """The results of all questions that have such a grammar, some calls at a time."""
    plan = [(i, one, constrain(one)) for i, one in enumerate(questions)]
    if constrain is not VARIANTS[NO_GRAMMAR][0]:
        plan = [one for one in plan if one[2] is not None]
    waiting = iter(plan)
    found: list[Result] = []

    async def caller() -> None:
        for number, one, grammar in waiting:
            task = pb.InlineTask(user=one.user, system=one.system, grammar=grammar, **fields)
            request = pb.RunTaskRequest(
                task=pb.Task(inline=task), images=[pb.Image(data=data) for data in one.images]
            )
            found.append(await _one(number, one, stub.RunTask(request)))

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return found


async def _one(number: int, one: Ask, call: Awaitable[Any]) -> Result:
    try:
        reply = await call
    except grpc.aio.AioRpcError as error:
        return Result(number, read_error(error).reason or error.code().name, False)
    return Result(number, "OK", one.is_right(reply.result.text))


def row(name: str, found: Sequence[Result], free: dict[int, bool]) -> dict[str, Any]:
    """A line of the table. free: by question, whether the answer without a grammar is right."""
    calls = len(found)
    right = 100 * sum(one.is_right for one in found) / calls
    without = 100 * sum(free[one.number] for one in found) / calls
    reasons = Counter(one.reason for one in found if one.reason != "OK")
    return {
        "grammar": name,
        "calls": calls,
        "OK, %": 100 * sum(one.reason == "OK" for one in found) / calls,
        "right, %": right,
        "right, without, %": without,
        "tax, points": without - right,
        "errors": ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items())) or "-",
    }


async def measured(drawings: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of all variants."""
    questions = asks(drawings)
    rows = []
    async with serving(BUNDLED_MODEL) as stub:
        free: dict[int, bool] = {}
        for name in names:
            constrain, fields = VARIANTS[name]
            found = await answered(stub, questions, constrain, fields)
            if name == NO_GRAMMAR:
                free = {one.number: one.is_right for one in found}
            rows.append(row(name, found, free))
            print(markdown([rows[-1]]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one drawing, to see that it runs")
    parser.add_argument("--drawings", type=int, default=DRAWINGS)
    options = parser.parse_args()
    drawings = QUICK_DRAWINGS if options.quick else options.drawings
    rows = asyncio.run(measured(drawings, list(VARIANTS)))
    print(markdown(rows))
    notes = NOTES.format(drawings=drawings, questions=len(QUESTIONS) + 1, choices=MOST_CHOICES)
    write_results("goodput", rows, notes)


if __name__ == "__main__":
    main()
