"""What the models of all requests are made of: how a field is treated, numbers, tagged unions."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, model_validator

MAX_MESSAGES = 1024
MAX_PARTS = 1024
MAX_TOOLS = 128
MAX_UNKNOWN = 16
"""Unknown fields of one object that are looked at."""
INT32_MAX = 2**31 - 1
NAME = r"^[A-Za-z0-9_-]{1,64}$"

UNKNOWN_KIND = "unknown_kind"
"""Type of the error of an object whose kind is missing or unknown. Its message: ``key|known kinds``."""
HONOURED, NEUTRAL, NO_EFFECT, REFUSED = "honoured", "neutral", "no effect", "refused"


class ImageSource(NamedTuple):
    """Where the URL of an image stands in its part, the URL, and how closely to look at the image."""

    field: str
    url: str
    detail: str | None


class Model(BaseModel):
    """Base of all models: unknown fields are refused, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    hints: ClassVar[dict[str, str]] = {}
    """Fields of other APIs -> what to send in their place."""

    @model_validator(mode="before")
    @classmethod
    def _without_most_unknown(cls, value: Any) -> Any:
        """pydantic's error about a field takes 700 bytes: 100,000 unknown fields would take 70 MB."""
        fields = cls.__pydantic_fields__
        if not isinstance(value, dict) or len(value) <= len(fields) + MAX_UNKNOWN:
            return value
        known = {field.alias or name for name, field in fields.items()}
        unknown = [name for name in value if name not in known]
        dropped = set(unknown[MAX_UNKNOWN:])
        return {name: one for name, one in value.items() if name not in dropped}


def treated(treatment: str, description: str, default: Any = None, **more: Any) -> Any:
    """A field of a request, with its treatment for the OpenAPI document and for errors."""
    extra: dict[str, Any] = {"x-treatment": treatment}
    return Field(default, description=description, json_schema_extra=extra, **more)


def by(key: str, *known: str, otherwise: str = "") -> Discriminator:
    """Tells objects of a union apart by a key. Tags are in angle brackets, as no key of ours is, so
    that they can be told from keys in the location of an error.

    otherwise: kind of an object without the key.
    """

    def tag(value: Any) -> str:
        return f"<{value.get(key, otherwise)}>" if isinstance(value, dict) else "<>"

    return Discriminator(
        tag,
        custom_error_type=UNKNOWN_KIND,
        custom_error_message=f"{key}|{', '.join(known)}",
    )


def text_or_object(value: Any) -> str:
    """Tag of a text or of an object."""
    return "<text>" if isinstance(value, str) else "<object>"


def text_or_parts(value: Any) -> str:
    """Tag of a text or of a list."""
    return "<parts>" if isinstance(value, list) else "<text>"


def word_or_tool(value: Any) -> str:
    """Tag of a word or of the name of a tool."""
    return "<word>" if isinstance(value, str) else "<tool>"


def _from_decimal(value: Any) -> Any:
    """JSON numbers are read as exact decimals, which schemas need and other fields do not."""
    return float(value) if isinstance(value, Decimal) else value


Number = Annotated[float, BeforeValidator(_from_decimal)]
Zero = Annotated[float, BeforeValidator(_from_decimal), Field(ge=0, le=0)]
Count = Annotated[int, Field(le=INT32_MAX)]
