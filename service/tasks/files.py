"""Task files of an operator: YAML or JSON, one task in each.

name: count-people            # optional; the file's name without its ending
description: Counts people.
user: How many people are in the picture? Answer with JSON.
needs_image: true
json_schema:                  # at most one of json_schema, regex, ebnf, choice; none: any text
  type: object
  properties: {people: {type: integer, minimum: 0}}
  required: [people]
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from service.errors import GrammarError
from service.tasks import jsontext
from service.tasks.contract import Task
from service.types import Grammar, GrammarKind

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
"""Names of tasks: lower-case words joined by hyphens."""
MAX_FILE_BYTES = 256 * 1024
MAX_YAML_DEPTH = 100
"""Levels of nesting; the time that the YAML scanner takes grows with their square."""
ENDINGS = (".yaml", ".yml", ".json")


class TaskFile(BaseModel):
    """What a task file may hold. Anything else is an error, so that a misspelt key is not lost."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Annotated[str, Field(pattern=rf"^{NAME.pattern}$", max_length=64)]
    description: Annotated[str, Field(min_length=1, max_length=1000)]
    user: Annotated[str, Field(pattern=r"\S")]
    system: str = ""
    needs_image: bool = False
    max_images: Annotated[int, Field(ge=1)] | None = None
    json_schema: dict[str, JsonValue] | bool | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    choice: list[str] | None = None

    def grammar(self) -> Grammar | None:
        """The grammar; its kind is the key that holds it."""
        given = [kind for kind in GrammarKind if getattr(self, kind.value) is not None]
        if len(given) > 1:
            names = " and ".join(kind.value for kind in given)
            raise GrammarError(names, "give only one of them")
        if not given:
            return None
        value = getattr(self, given[0].value)
        source = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return Grammar(given[0], source)


def load_tasks(folder: Path) -> tuple[list[tuple[str, Task]], list[str]]:
    """Tasks with the names of their files, and every problem as ``file: field: reason``.

    Grammars are read, not checked.
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
            for item in error.errors(include_url=False, include_input=False):
                where = ".".join(str(part) for part in item["loc"][:3]) or "file"
                problems.append(f"{path.name}: {where}: {item['msg']}")
        except GrammarError as error:
            problems.append(f"{path.name}: {error.message}")
        except (OSError, UnicodeDecodeError):
            problems.append(f"{path.name}: file: cannot be read as UTF-8 text")
        except (yaml.YAMLError, jsontext.JsonTextError, _FileError, RecursionError) as error:
            problems.append(f"{path.name}: file: {_reason(error)}")
    return found, problems


class _FileError(ValueError):
    """A file is not a task file at all."""


def _load(path: Path) -> Task:
    if not path.is_file():  # a pipe or a device would be read for ever; links to files are fine
        raise _FileError("is not a file that can be read")
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise _FileError(f"has more than {MAX_FILE_BYTES} bytes")
    text = data.decode("utf-8-sig")
    content = jsontext.decode(text) if path.suffix == ".json" else _yaml(text)
    if not isinstance(content, dict):
        raise _FileError("must hold keys and values")
    values = TaskFile.model_validate({"name": path.stem, **content})
    return Task(
        name=values.name,
        description=values.description,
        system=values.system,
        user=values.user,
        grammar=values.grammar(),
        needs_image=values.needs_image,
        max_images=values.max_images,
    )


_OPENING = (
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)


def _yaml(text: str) -> Any:
    # An alias makes a small file large once it is written out, and no task needs one.
    level = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        level += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if level > MAX_YAML_DEPTH:
            raise _FileError(f"is nested more than {MAX_YAML_DEPTH} levels deep")
        if isinstance(token, (yaml.AliasToken, yaml.AnchorToken)):
            raise _FileError("anchors and aliases are not allowed")
    return yaml.load(text, Loader=_UniqueKeys)


class _UniqueKeys(yaml.SafeLoader):
    """Plain data only, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                line = key.start_mark.line + 1
                raise _FileError(f"duplicate key {jsontext.short(name)} at line {line}")
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


def _reason(error: Exception) -> str:
    """What is wrong, in one line and without the file's path."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        return f"is not YAML: {error.problem}{where}"
    if isinstance(error, jsontext.JsonTextError):
        return f"is not JSON: {error}"
    return "is nested too deep" if isinstance(error, RecursionError) else str(error)
