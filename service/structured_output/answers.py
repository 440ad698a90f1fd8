"""The final validation of a finished answer against the schema that the caller sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jsonschema import ValidationError

from service.errors import OutputInvalid
from service.schema_compiler import jsontext
from service.schema_compiler.budget import (
    DEFAULT_SECONDS,
    DEFAULT_STEPS,
    Budget,
    BudgetExceeded,
    bounded,
)
from service.schema_compiler.frontend.checked_schema import checked_schema
from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits


def parse_json(text: str, *, exact: bool = False) -> Any:
    """Parse the answer as one JSON value. Where the name of a member comes again in its object, the
    last one counts. Raises ``OutputInvalid`` for NaN, and for text before or after the value.
    exact: as in `jsontext.decode`."""
    try:
        return jsontext.decode(text, exact=exact, names_may_repeat=True)
    except jsontext.JsonTextError as error:
        message = f"The model's answer is not strict JSON: {error}."
        raise OutputInvalid(message, metadata={"pointer": "", "keyword": "json"}) from None


class NotInTime(OutputInvalid):
    """The answer could not be validated within the limits of the validator."""

    def __init__(self) -> None:
        message = "The model's answer could not be validated in bounded time."
        super().__init__(message, metadata={"pointer": "", "keyword": ""})


@dataclass(frozen=True, slots=True)
class AnswerValidator:
    """Validates answers against one schema. For a schema that was used before, the constructor
    takes microseconds.

    seconds, steps: limits of one validation; an answer that cannot be validated within them is
    refused.
    """

    schema: str
    limits: SchemaLimits = DEFAULT_LIMITS
    seconds: float = DEFAULT_SECONDS
    steps: int = DEFAULT_STEPS

    def parse(self, text: str) -> Any:
        """Parse an answer strictly and validate it."""
        value = parse_json(text)
        self.check(text)
        return value

    def check(self, text: str) -> str:
        """Raise ``OutputInvalid`` for the first violation, with the JSON pointer into the answer
        and the keyword. Numbers are compared as the decimals that were written, not as binary64
        approximations.

        Returns the document that is validated: the text, without members whose name comes again in
        their object, as `jsontext.without_repeats` writes it."""
        value, document = _read(text)
        validator = checked_schema(self.schema, self.limits).validator
        try:
            with bounded(Budget(self.seconds, self.steps)):
                error = next(validator.iter_errors(value), None)
        except (BudgetExceeded, RecursionError):
            raise NotInTime from None
        if error is not None:
            pointer = jsontext.pointer(error.absolute_path)
            raise invalid("does not fit the schema", pointer, _keyword(error))
        return document


def _read(text: str) -> tuple[Any, str]:
    """The value of an answer, and the document without members whose name comes again."""
    try:
        return jsontext.decode(text, exact=True), text
    except jsontext.JsonTextError:  # a name comes again, or it is not JSON
        pass
    value = parse_json(text, exact=True)
    document = jsontext.without_repeats(text)
    return (value if document == text else parse_json(document, exact=True)), document


def _keyword(error: ValidationError) -> str:
    return str(error.validator or "false")  # the schema `false` has no keyword


def invalid(
    what: str, pointer: str, keyword: str, *, after_tokens: int | None = None
) -> OutputInvalid:
    """The error for an answer. after_tokens: where generation was ended because of it."""
    where = f" at {jsontext.short(pointer, 200)}" if pointer else ""
    why = f" ({keyword})" if keyword else ""
    metadata = {"pointer": pointer[:500], "keyword": keyword}
    end = ""
    if after_tokens is not None:
        metadata["output_tokens"] = str(after_tokens)
        end = f" Generation ended after {after_tokens} tokens, as no further text could mend that."
    return OutputInvalid(f"The model's answer {what}{where}{why}.{end}", metadata=metadata)
