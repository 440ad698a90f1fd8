"""Task files of an operator: YAML or JSON, one task in each.

name: count-people            # optional; the file's name without its ending
description: Counts people.
user: How many people are in the image? Answer with JSON.
needs_image: true
property_order: any           # optional, of a json_schema; declared, or any. None: the server's
json_schema:                  # at most one of json_schema, regex, ebnf, choice; none: any text
  type: object
  properties: {people: {type: integer, minimum: 0}}
  required: [people]
examples:                     # optional: see `service.tasks.examples`
  - user: How many people are in the image? Answer with JSON.
    images: [crowd.jpg]
    assistant: '{"people": 31}'
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from service.errors import GrammarError
from service.schema_compiler import jsontext
from service.tasks import yamltext
from service.tasks.contract import Task
from service.tasks.examples import MAX_EXAMPLES, Example, ExampleError, read_examples
from service.types import Grammar, GrammarKind, PropertyOrder

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
"""Names of tasks: lower-case words joined by hyphens."""
MAX_FILE_BYTES = 256 * 1024
ENDINGS = (".yaml", ".yml", ".json")


class TaskFile(BaseModel):
    """The keys of a task file. Other keys are errors, so that a misspelt key is noticed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    # Each description completes the sentence "KEY must be …".
    name: str = Field(
        pattern=rf"^{NAME.pattern}$",
        max_length=64,
        description="lower-case words joined by hyphens, of at most 64 characters in all",
    )
    description: str = Field(
        min_length=1, max_length=1000, description="text of 1 to 1000 characters"
    )
    user: str = Field(pattern=r"\S", description="text that is not blank")
    system: str = Field("", description="text")
    needs_image: bool = Field(False, description="true or false")
    max_images: int | None = Field(None, ge=1, description="a whole number of at least 1")
    json_schema: str | None = Field(
        None, description="a mapping, true, false, or the JSON text of a schema"
    )
    regex: str | None = Field(None, description="text")
    ebnf: str | None = Field(None, description="text")
    choice: list[str] | None = Field(None, description="a list of texts")
    examples: list[Example] = Field(
        [],
        max_length=MAX_EXAMPLES,
        description=f"a list of at most {MAX_EXAMPLES} examples with user, images and assistant",
    )
    property_order: Literal["declared", "any"] | None = Field(None, description="declared or any")
    close_objects: bool | None = Field(None, description="true or false")
    schema_in_prompt: bool | None = Field(None, description="true or false")

    @field_validator("json_schema", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Convert a schema that is written as YAML to JSON text; numbers keep their digits."""
        return yamltext.json_text(value) if isinstance(value, (dict, bool)) else value

    def grammar(self) -> Grammar | None:
        """The grammar; its kind is the key under which the file gives it."""
        given = [kind for kind in GrammarKind if getattr(self, kind.value) is not None]
        if len(given) > 1:
            names = " and ".join(kind.value for kind in given)
            raise GrammarError(names, "give only one of them")
        order = None if self.property_order is None else PropertyOrder(self.property_order)
        for option in ("property_order", "close_objects", "schema_in_prompt"):
            if getattr(self, option) is not None and given != [GrammarKind.JSON_SCHEMA]:
                raise GrammarError(option, "is for a json_schema alone; leave it out")
        if not given:
            return None
        value = getattr(self, given[0].value)
        source = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return Grammar(given[0], source, property_order=order, close_objects=self.close_objects)


def load_tasks(folder: Path) -> tuple[list[tuple[str, Task]], list[str]]:
    """The tasks of a folder with their file names, and every problem as ``file: field: reason``.

    Grammars are read but not checked.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return [], ["tasks_dir: is not a folder that can be read"]
    found: list[tuple[str, Task]] = []
    problems: list[str] = []
    for path in paths:
        if path.suffix not in ENDINGS or path.name.startswith("."):
            continue
        try:
            found.append((path.name, _load(path)))
        except ValidationError as error:
            problems += [f"{path.name}: {line}" for line in map(_problem, error.errors())]
        except GrammarError as error:
            problems.append(f"{path.name}: {error.message}")
        except ExampleError as error:
            problems.append(f"{path.name}: {error}")
        except (OSError, UnicodeDecodeError):
            problems.append(f"{path.name}: file: cannot be read as UTF-8 text")
        except (yamltext.YamlTextError, jsontext.JsonTextError, _FileError) as error:
            problems.append(f"{path.name}: file: {_reason(error)}")
    return found, problems


class _FileError(ValueError):
    """The whole file cannot be read as a task file."""


def _load(path: Path) -> Task:
    if not path.is_file():  # reading a pipe or a device might never end; links to files are allowed
        raise _FileError("is not a file that can be read")
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise _FileError(f"has more than {MAX_FILE_BYTES} bytes")
    text = data.decode("utf-8-sig")
    is_json = path.suffix == ".json"
    content = jsontext.decode(text, exact=True) if is_json else yamltext.decode(text)
    if not isinstance(content, dict):
        raise _FileError("must hold keys and values")
    values = TaskFile.model_validate({"name": path.stem, **content})
    examples, images = read_examples(values.examples, path.parent)
    return Task(
        name=values.name,
        description=values.description,
        system=values.system,
        user=values.user,
        grammar=values.grammar(),
        needs_image=values.needs_image,
        max_images=values.max_images,
        examples=examples,
        example_images=images,
        schema_in_prompt=values.schema_in_prompt,
    )


def _problem(item: Mapping[str, Any]) -> str:
    """An entry of ``ValidationError.errors()`` as ``key: what is wrong, what is allowed``."""
    key, *index = map(str, item["loc"])
    known = TaskFile.model_fields
    place = ""
    if key == "examples" and len(index) > 1:
        place = f"examples[{index[0]}]."
        known, key, index = Example.model_fields, index[1], index[2:]
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        allowed = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}"
        what = "an example" if place else "a task file"
        return f"{place}{jsontext.short(key)[1:-1]}: is not a key of {what}; {allowed}"
    allowed = known[key].description or ""
    if item["type"] == "missing":
        return f"{place}{key}: is missing; it must be {allowed}"
    if index:
        key, allowed = f"{key}[{index[0]}]", "text"
    value = item["input"]
    quote = "text" in allowed and isinstance(value, (bool, int, float, Decimal))
    return f"{place}{key}: must be {allowed}, not {_kind(value)}" + (
        "; put it in quotes" if quote else ""
    )


def _kind(value: Any) -> str:
    """The type of a value, for a message."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, Decimal)):
        return f"the number {value}"[:60]
    if isinstance(value, str):
        return jsontext.short(value)
    return "a mapping" if isinstance(value, dict) else "a list"


def _reason(error: Exception) -> str:
    """The message of an error in one line, without the file's path."""
    if isinstance(error, jsontext.JsonTextError):
        return f"is not JSON: {error}"
    return str(error)
