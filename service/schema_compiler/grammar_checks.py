"""What is refused of a grammar before an engine sees it, and what a finished answer must match."""

from __future__ import annotations

from service.errors import GrammarError, OutputInvalid
from service.schema_compiler import jsontext
from service.schema_compiler.budget import Budget, BudgetExceeded
from service.schema_compiler.frontend.checked_schema import check_json_schema
from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits
from service.schema_compiler.regex.matching import Pattern, PatternError, compile_pattern
from service.types import Grammar, GrammarKind


def check_grammar(
    grammar: Grammar, limits: SchemaLimits = DEFAULT_LIMITS, field: str = "grammar"
) -> None:
    """Raise ``GrammarError``, on a field below ``field``, for a grammar that cannot be used.

    The syntax of EBNF is the engine's: ``prepare`` compiles it. Here it only has a size.
    """
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        check_json_schema(grammar.source, limits, f"{field}.json_schema")
    elif grammar.kind is GrammarKind.REGEX:
        _regex(grammar.source, limits, f"{field}.regex")
    elif grammar.kind is GrammarKind.CHOICE:
        _check_choice(grammar.source, limits, f"{field}.choice.options")
    else:
        _check_size(grammar.source, limits, f"{field}.ebnf")


def check_answer(grammar: Grammar, text: str, limits: SchemaLimits = DEFAULT_LIMITS) -> None:
    """Raise ``OutputInvalid`` when the text of an answer does not match a REGEX or is none of a
    CHOICE.

    EBNF has no second opinion here, and JSON schemas have ``AnswerValidator``.
    """
    if grammar.kind is GrammarKind.REGEX:
        pattern = _regex(grammar.source, limits, "grammar.regex")
        try:
            matches = pattern.search(text, Budget())
        except BudgetExceeded:
            message = "The model's answer could not be validated in bounded time."
            raise OutputInvalid(message, metadata={"keyword": "regex"}) from None
        if not matches:
            message = "The model's answer does not match the regular expression."
            raise OutputInvalid(message, metadata={"keyword": "regex"})
    elif grammar.kind is GrammarKind.CHOICE and text not in jsontext.decode(grammar.source):
        message = "The model's answer is none of the choices."
        raise OutputInvalid(message, metadata={"keyword": "choice"})


def _regex(source: str, limits: SchemaLimits, field: str) -> Pattern:
    if not source:
        raise GrammarError(field, "is empty")
    try:
        return compile_pattern(source, whole=True, max_length=limits.max_regex_length)
    except PatternError as error:
        raise GrammarError(field, str(error)) from None


def _check_size(source: str, limits: SchemaLimits, field: str) -> None:
    if not source.strip():
        raise GrammarError(field, "is empty")
    size = len(source.encode("utf-8", "surrogatepass"))
    if size > limits.max_bytes:
        raise GrammarError(
            field,
            f"has {size} bytes, at most {limits.max_bytes} are allowed",
            metadata={"limit": str(limits.max_bytes), "actual": str(size)},
        )


def _check_choice(source: str, limits: SchemaLimits, field: str) -> None:
    _check_size(source, limits, field)
    try:
        options = jsontext.decode(source)
    except jsontext.JsonTextError as error:
        raise GrammarError(field, f"is not JSON: {error}") from None
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise GrammarError(field, "must be a list of strings")
    if not options:
        raise GrammarError(field, "is empty; give at least one option")
    if len(options) > limits.max_choices:
        raise GrammarError(
            field,
            f"has {len(options)} options, at most {limits.max_choices} are allowed",
            metadata={"limit": str(limits.max_choices), "actual": str(len(options))},
        )
    seen: dict[str, int] = {}
    for i, option in enumerate(options):
        if not option.strip():
            raise GrammarError(f"{field}[{i}]", "is blank")
        if option in seen:
            raise GrammarError(f"{field}[{i}]", f"is the same as options[{seen[option]}]")
        seen[option] = i
