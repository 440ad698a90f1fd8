"""Settings of the remote engine. This module imports no HTTP client."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from service.engines.kind import CONTEXT_LENGTH, EngineSettings
from service.engines.remote.wire import parse_url

MAX_KEY_BYTES = 16_384
MAX_PIXELS = 16_777_216
_FILES = ("remote_file", "remote_key_file", "remote_ca", "remote_cert", "remote_cert_key")

_OF_ONE_SERVER = (
    "remote_url", "remote_model", "remote_kind", "remote_key", "remote_key_file", "remote_ca",
    "remote_cert", "remote_cert_key", "remote_discover", "context_length",
)  # fmt: skip
"""Settings that a file with back ends has for each of them."""
_OF_A_URL = (
    "remote_url", "remote_key", "remote_key_file", "remote_ca", "remote_cert", "remote_cert_key",
)  # fmt: skip
"""Settings of a server that is named; a server that was found gets no key."""


class RemoteSettings(EngineSettings):
    """Settings of the remote engine for operators; each becomes a flag and a variable."""

    remote_url: str | None = Field(
        None,
        description="URL of the server that runs the model, such as http://127.0.0.1:8000, with or "
        "without /v1; grpc://HOST:PORT (grpcs:// with TLS) for a server of this project.",
    )
    remote_discover: bool = Field(
        False,
        description="Look for a model server on this machine at the start, in place of remote_url: at "
        "VLLM_MLX_ENDPOINT, then on the usual ports. More than one is an error that names them.",
    )
    remote_file: Path | None = Field(
        None,
        description="YAML file with several back ends and models, in place of remote_url and the "
        "settings of one server; see docs/remote.md.",
    )
    remote_model: str | None = Field(
        None,
        min_length=1,
        description="Name of the model on that server; unset: the only one that it lists.",
    )
    remote_kind: Literal[
        "auto", "vllm", "sglang", "lmdeploy", "llama.cpp", "ollama", "lm-studio", "vllm-mlx",
        "mistral.rs", "qwen3vl-http", "qwen3vl-grpc", "unknown",
    ] = Field(
        "auto",
        description="Kind of that server, which decides how it is asked; auto: found out. unknown "
        "is OpenAI's API and nothing more.",
    )  # fmt: skip
    remote_key: SecretStr | None = Field(
        None,
        description="API key for that server; in the environment only, because other users of the "
        "machine can read flags.",
    )
    remote_key_file: Path | None = Field(
        None, description="File with the API key for that server, in place of remote_key."
    )
    remote_ca: Path | None = Field(
        None,
        description="CA of that server's certificate, a PEM file; unset: those of the system.",
    )
    remote_cert: Path | None = Field(
        None, description="Certificate that this server shows to that server, a PEM file."
    )
    remote_cert_key: Path | None = Field(
        None, description="Private key of remote_cert, a PEM file."
    )
    remote_connect_s: float = Field(
        5.0,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        description="Maximum time to connect to that server, in seconds.",
    )
    remote_silence_s: float = Field(
        120.0,
        gt=0,
        le=86_400,
        allow_inf_nan=False,
        description="Maximum time without a byte of an answer, in seconds; with --no-remote-stream "
        "of the whole answer. Whole answers of llama.cpp may take until the deadline of the request.",
    )
    remote_start_s: float = Field(
        60.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="Maximum time to wait for that server at the start, in seconds.",
    )
    remote_connections: int = Field(
        256, ge=1, le=65_536, description="Maximum number of requests to one server at a time."
    )
    remote_retries: int = Field(
        2,
        ge=0,
        le=10,
        description="Maximum number of further attempts where nothing was generated: no connection, "
        "or an answer 429 or 503.",
    )
    remote_stream: bool = Field(
        True, description="Ask for streams, which end early when a caller leaves."
    )
    remote_probe: bool = Field(
        False,
        description="At the start, also try out what the servers do not tell of themselves, such as "
        "whether they obey schemas: dozens of short requests to each model.",
    )
    remote_resize: bool = Field(
        False,
        description="Send images in the size of the model's own processing, by bicubic interpolation, "
        "so that a server that resizes in another way has nothing to resize. Not for servers of this "
        "project over gRPC, which do it themselves.",
    )
    remote_min_pixels: int = Field(
        65_536,
        ge=1024,
        le=MAX_PIXELS,
        description="Smallest area of an image after remote_resize, in pixels, where a request sets "
        "none; size.shortest_edge of preprocessor_config.json.",
    )
    remote_max_pixels: int = Field(
        MAX_PIXELS,
        ge=1024,
        le=MAX_PIXELS,
        description="Largest area of an image after remote_resize, in pixels, where a request sets "
        "none; size.longest_edge of preprocessor_config.json.",
    )
    context_length: int | None = Field(None, ge=16, description=CONTEXT_LENGTH)

    @field_validator("remote_url")
    @classmethod
    def _readable_url(cls, url: str | None) -> str | None:
        return None if url is None else parse_url(url)

    @field_validator(*_FILES)
    @classmethod
    def _existing_file(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError(f"there is no file {path}")
        return path

    @classmethod
    def why_not(cls, name: str) -> str | None:
        return "is a setting of the server that runs the model, not of engine=remote"

    @model_validator(mode="after")
    def _combinations(self) -> RemoteSettings:
        if self.remote_min_pixels > self.remote_max_pixels:
            raise ValueError("remote_min_pixels: must not be above remote_max_pixels")
        if self.remote_file is not None:
            for name in _OF_ONE_SERVER:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: has no effect beside remote_file, which sets it")
            return self
        if self.remote_discover:
            for name in _OF_A_URL:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: has no effect beside remote_discover")
            return self
        if self.remote_url is None:
            raise ValueError(
                "remote_url: engine=remote needs the URL of a server, a remote_file or "
                "remote_discover"
            )
        grpc = self.remote_url.startswith("grpc")
        if self.remote_kind != "auto" and grpc is not (self.remote_kind == "qwen3vl-grpc"):
            raise ValueError("remote_kind: qwen3vl-grpc belongs to grpc:// and grpcs:// URLs")
        if self.remote_key is not None and self.remote_key_file is not None:
            raise ValueError("remote_key: has no effect beside remote_key_file; set one of them")
        if (self.remote_cert is None) != (self.remote_cert_key is None):
            raise ValueError("remote_cert: remote_cert and remote_cert_key belong together")
        tls = self.remote_url.startswith(("https:", "grpcs:"))
        for name in ("remote_ca", "remote_cert"):
            if getattr(self, name) is not None and not tls:
                raise ValueError(f"{name}: needs a remote_url with https:// or grpcs://")
        return self

    @property
    def key(self) -> str | None:
        """The API key, read from its file where there is one. Raises ``ValueError``."""
        if self.remote_key_file is not None:
            return read_key(self.remote_key_file)
        return None if self.remote_key is None else self.remote_key.get_secret_value()


def read_key(path: Path) -> str:
    """The API key in a file. Raises ``ValueError`` that does not show the content."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    key = data[: MAX_KEY_BYTES + 1].decode("ascii", "replace").strip()
    if not key or len(key) > MAX_KEY_BYTES or not key.isascii() or not key.isprintable():
        raise ValueError(f"{path} must hold one API key: a line of printable ASCII characters")
    return key
