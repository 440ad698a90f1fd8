"""What a task is, and what a run of it gives.

A task owns prompt, grammar and parser; engines know none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.tasks.grammars.report import GrammarReport
from service.types import FinishReason, Grammar, GrammarKind, Timings, Usage


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, the shape of its answer and how the answer is read. Runs unchanged on every engine.

    parse: text of a complete answer -> value; raises a ``ServiceError``. None reads JSON strictly
    where
        the grammar is a JSON schema and leaves the text as it is otherwise.
    document: value -> plain JSON value, for a parser that tidies; this, then, is what is validated
        and given to callers as JSON. None: the answer itself.
    usable: whether a value says anything; checked unless the caller accepts empty answers.
    max_images: None leaves the limit to the engine.
    report: what the grammar enforces; set with the grammar's ``ebnf`` when the task is admitted.
    grammar_field: path of the field of a request that errors of the grammar name.
    """

    name: str
    description: str
    user: str
    system: str = ""
    grammar: Grammar | None = None
    needs_image: bool = False
    max_images: int | None = None
    parse: Callable[[str], Any] | None = None
    document: Callable[[Any], object] | None = None
    usable: Callable[[Any], bool] | None = None
    report: GrammarReport | None = None
    grammar_field: str = "task.name"

    @property
    def answers_json(self) -> bool:
        """Whether a result has JSON beside its text."""
        return self.document is not None or (
            self.grammar is not None and self.grammar.kind is GrammarKind.JSON_SCHEMA
        )


@dataclass(frozen=True, slots=True, eq=False)
class TaskResult:
    """A complete, validated answer.

    text: exactly what the model wrote. value: what the parser made of it.
    json: the answer as JSON text where the task answers in JSON; ``text`` itself unless the task
    tidies.
    attempts: how many it took; usage and timings are those of all of them together.
    """

    text: str
    value: Any
    usage: Usage
    finish_reason: FinishReason
    timings: Timings
    json: str | None = None
    attempts: int = 1
