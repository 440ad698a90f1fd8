"""The YAML file with several back ends and models.

backends:
  gpu-1: {url: "http://10.0.0.5:8000", kind: vllm, key_file: /run/secrets/vllm}
  gpu-2: {url: "http://10.0.0.6:8000", kind: vllm, key_variable: VLLM_KEY}
  worker: {url: "grpcs://10.0.0.7:50051", ca: /etc/ca.pem}
models:
  qwen3-vl-8b: {backends: [gpu-1, gpu-2], model: Qwen/Qwen3-VL-8B-Instruct}
  drawings: {backends: [worker]}

Relative paths of files are seen from the folder of the YAML file.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from service.engines.remote.options import read_key
from service.engines.remote.servers import SERVERS
from service.engines.remote.wire import parse_url

MAX_BACK_ENDS = 256
"""Maximum number of back ends: each has series of its own in the metrics."""
MAX_FILE_BYTES = 1 << 20
FOLDER = "folder"
"""Key of the context of a validation: the folder from which relative paths are seen."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BackEndEntry(_Part):
    """One server. ``key_file`` and ``key_variable`` say where its API key is."""

    url: str
    kind: str = "auto"
    key_file: str | None = None
    key_variable: str | None = None
    ca: str | None = None
    cert: str | None = None
    cert_key: str | None = None

    @field_validator("url")
    @classmethod
    def _readable_url(cls, url: str) -> str:
        return parse_url(url)

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if kind != "auto" and kind not in SERVERS:
            raise ValueError(f"there is no kind {kind!r}; there are auto, {', '.join(SERVERS)}")
        return kind

    @field_validator("key_file", "ca", "cert", "cert_key")
    @classmethod
    def _existing_file(cls, path: str | None, info: ValidationInfo) -> str | None:
        """The path, seen from the folder of the YAML file where there is one."""
        if path is None:
            return None
        found = Path((info.context or {}).get(FOLDER, ""), path)
        if not found.is_file():
            raise ValueError(f"there is no file {found}")
        return str(found)

    @model_validator(mode="after")
    def _combinations(self) -> BackEndEntry:
        if self.key_file is not None and self.key_variable is not None:
            raise ValueError("key_file and key_variable: set one of them")
        if (self.cert is None) != (self.cert_key is None):
            raise ValueError("cert and cert_key belong together")
        if self.kind != "auto" and self.url.startswith("grpc") != (self.kind == "qwen3vl-grpc"):
            raise ValueError("kind: qwen3vl-grpc belongs to grpc:// and grpcs:// URLs")
        return self

    @property
    def key(self) -> str | None:
        """The API key. Raises ``ValueError`` where it cannot be read."""
        if self.key_file is not None:
            return read_key(Path(self.key_file))
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable)
        if not key:
            raise ValueError(f"key_variable: the variable {self.key_variable} is not set")
        return key


class ModelEntry(_Part):
    """One model. ``model``: its name on the servers; None takes the name for callers. ``resize``,
    ``min_pixels``, ``max_pixels``: in place of ``remote_resize`` and its bounds, for this model."""

    backends: Annotated[list[Name], Field(min_length=1)]
    model: str | None = Field(None, min_length=1)
    context_length: int | None = Field(None, ge=16)
    vision: bool = True
    resize: bool | None = None
    min_pixels: int | None = Field(None, ge=1024)
    max_pixels: int | None = Field(None, ge=1024)


class Fleet(_Part):
    """The content of the file. The first model answers requests that name none."""

    backends: Annotated[dict[Name, BackEndEntry], Field(min_length=1, max_length=MAX_BACK_ENDS)]
    models: Annotated[dict[Name, ModelEntry], Field(min_length=1)]

    @model_validator(mode="after")
    def _named_back_ends(self) -> Fleet:
        for name, model in self.models.items():
            for one in model.backends:
                if one not in self.backends:
                    raise ValueError(f"models.{name}.backends: there is no back end {one}")
            if len(set(model.backends)) < len(model.backends):
                raise ValueError(f"models.{name}.backends: names a back end twice")
        unused = self.backends.keys() - {b for one in self.models.values() for b in one.backends}
        if unused:
            raise ValueError(f"backends.{min(unused)}: no model uses it")
        return self


def read_fleet(path: Path) -> Fleet:
    """Read the file. Raises ``ValueError`` with a line for every problem."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        value = yaml.load(data, _Loader)
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = "" if where is None else f", line {where.line + 1}"
        raise ValueError(
            f"{path}{line}: {getattr(error, 'problem', None) or 'is not YAML'}"
        ) from None
    try:
        return Fleet.model_validate(value, context={FOLDER: path.absolute().parent})
    except ValidationError as error:
        problems = [_problem(found["loc"], found["msg"]) for found in error.errors()]
    raise ValueError("\n".join(f"{path}: {one}" for one in problems))


def _problem(location: tuple[int | str, ...], message: str) -> str:
    where = ".".join(map(str, location))
    text = message.removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice; YAML would take the last one without a word."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Hashable] = set()
    for key, _ in node.value:
        name = loader.construct_object(key, deep=True)
        if not isinstance(name, Hashable) or name in seen:
            raise yaml.MarkedYAMLError(
                problem=f"{name} is there twice", problem_mark=key.start_mark
            )
        seen.add(name)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
