"""Tasks that are defined in a request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from service.errors import GrammarError, InvalidRequest
from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits
from service.structured_output.analyser import Analyser
from service.tasks.contract import Task
from service.types import Grammar, Message, TextPart, ToolDefinition


@dataclass(frozen=True, slots=True)
class InlinePrompt:
    """The prompt of a caller: a system and a user text, or a conversation; and tools.

    schema_in_prompt: see `Task`.
    """

    system: str
    user: str
    messages: tuple[Message, ...] = ()
    tools: tuple[ToolDefinition, ...] = ()
    schema_in_prompt: bool | None = None

    def texts(self) -> Iterator[str]:
        """All texts of the caller that count towards ``max_text_bytes``."""
        yield from (self.system, self.user)
        for message in self.messages:
            yield from (part.text for part in message.parts if isinstance(part, TextPart))
            yield from (call.name + call.arguments for call in message.tool_calls)
        for tool in self.tools:
            yield tool.name + tool.description + tool.parameters


async def inline_task(
    prompt: InlinePrompt,
    grammar: Grammar | None,
    analyser: Analyser,
    limits: SchemaLimits = DEFAULT_LIMITS,
    *,
    max_text_bytes: int | None = None,
    field: str = "task.inline",
) -> Task:
    """Build the task of a caller. Raises ``InvalidRequest`` or ``GrammarError`` on fields below
    ``field``."""
    _check_texts(prompt, max_text_bytes, field)
    made = partial(
        Task,
        name="inline",
        description="A task of the request.",
        system=prompt.system,
        user=prompt.user,
        messages=prompt.messages,
        tools=prompt.tools,
        schema_in_prompt=prompt.schema_in_prompt,
        prompt_field=f"{field}.messages" if prompt.messages else "task",
    )
    if grammar is None:
        return made()
    try:
        analysed = await analyser(grammar, limits)
    except GrammarError as error:
        raise _below(field, error) from error
    return made(
        grammar=analysed.grammar,
        report=analysed.report,
        grammar_field=f"{field}.grammar.{grammar.kind.value}",
    )


def _check_texts(prompt: InlinePrompt, max_bytes: int | None, field: str) -> None:
    if not prompt.messages and not prompt.user.strip():
        raise InvalidRequest(
            f"{field}.user", "is empty; describe what the model should do", reason="TEXT_EMPTY"
        )
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in prompt.texts())
    if max_bytes is not None and size > max_bytes:
        raise InvalidRequest(
            f"{field}.messages" if prompt.messages else f"{field}.user",
            f"the texts of the task have {size} bytes, at most {max_bytes} are allowed",
            reason="TEXT_TOO_LONG",
            metadata={"limit": str(max_bytes), "actual": str(size)},
        )


def _below(field: str, error: GrammarError) -> GrammarError:
    """Replace the field ``grammar`` of an error of the analysis by the path in the caller's
    message."""
    violation = error.violations[0]
    return GrammarError(
        f"{field}.{violation.field}",
        violation.description,
        reason=error.reason,
        metadata=error.metadata,
    )
