"""Tasks that travel with a request."""

from __future__ import annotations

from service.errors import InvalidRequest
from service.tasks.contract import Task
from service.tasks.grammar_checks import check_grammar
from service.tasks.schema import DEFAULT_LIMITS, SchemaLimits
from service.types import Grammar


def inline_task(
    system: str,
    user: str,
    grammar: Grammar | None,
    limits: SchemaLimits = DEFAULT_LIMITS,
    *,
    max_text_bytes: int | None = None,
    admitted: bool = False,
    field: str = "task.inline",
) -> Task:
    """A task of a caller. Raises ``InvalidRequest`` or ``GrammarError`` on fields below ``field``.

    A schema that is new takes milliseconds, a large one up to seconds: call it off the event loop,
    except where the grammar was ``admitted`` before and is not checked again.
    """
    if not user.strip():
        raise InvalidRequest(f"{field}.user", "is empty; say what to do", reason="TEXT_EMPTY")
    size = len(user.encode("utf-8", "surrogatepass")) + len(system.encode("utf-8", "surrogatepass"))
    if max_text_bytes is not None and size > max_text_bytes:
        raise InvalidRequest(
            f"{field}.user",
            f"system and user texts have {size} bytes, at most {max_text_bytes} are allowed",
            reason="TEXT_TOO_LONG",
            metadata={"limit": str(max_text_bytes), "actual": str(size)},
        )
    if grammar is not None and not admitted:
        check_grammar(grammar, limits, f"{field}.grammar")
    return Task(
        name="inline",
        description="A task of the request.",
        system=system,
        user=user,
        grammar=grammar,
    )
