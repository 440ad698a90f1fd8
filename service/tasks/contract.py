"""The definition of a task.

A task owns its prompt, grammar and parser. Engines do not know tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from service.schema_compiler.report import Analysed, GrammarReport
from service.types import (
    EncodedImage,
    Grammar,
    ImagePart,
    ImageSource,
    Message,
    ToolDefinition,
    short_conversation,
)


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, the grammar of its answer and a parser. Runs unchanged on every engine.

    parse: text of a complete answer -> value; raises a ``ServiceError``. Names of members can repeat
        in the text; the last one counts, as in JSON parsers. None: parse JSON strictly
        if the grammar is a JSON schema, else keep the text.
    document: value -> plain JSON value, for a parser that tidies the answer. This value is then
        validated and returned to callers as JSON. None: the answer itself.
    usable: whether a value has any information; checked unless the caller accepts empty answers.
    max_images: None means the limit of the engine.
    report: the enforcement of each schema keyword; set together with the grammar's ``ebnf``.
    counted: grammar and report for an engine that does not limit lengths of strings; None if the
        grammar is the same for all engines.
    messages: a whole conversation instead of ``system`` and ``user``, with empty image parts.
    examples: turns between the system text and the question that show how to answer.
    example_images: the images of the examples, in order.
    tools: tools that the model may call.
    schema_in_prompt: whether the prompt has the JSON schema of the answer; None uses the default of
        the server or of the model.
    grammar_field, prompt_field: paths of the request fields that errors of the grammar and of the
    whole prompt name.
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
    counted: Analysed | None = None
    grammar_field: str = "task.name"
    prompt_field: str = "task"
    messages: tuple[Message, ...] = ()
    examples: tuple[Message, ...] = ()
    example_images: tuple[EncodedImage, ...] = ()
    tools: tuple[ToolDefinition, ...] = ()
    schema_in_prompt: bool | None = None

    def conversation(self, images: Sequence[ImageSource]) -> tuple[Message, ...]:
        """The prompt as messages, with the images of the examples and of the request in place."""
        if self.messages:
            return filled(self.messages, images)
        shown = images[len(self.example_images) :]
        examples = filled(self.examples, images)
        return short_conversation(self.system, shown, self.user, examples)


def filled(messages: Sequence[Message], images: Sequence[ImageSource]) -> tuple[Message, ...]:
    """The messages, with their empty image parts replaced by the images, in order."""
    remaining = iter(images)
    return tuple(
        replace(
            message,
            parts=tuple(
                ImagePart(next(remaining)) if isinstance(part, ImagePart) else part
                for part in message.parts
            ),
        )
        for message in messages
    )
