"""Settings of the server: environment variables ``QWEN3VL_…``, or arguments of ``Settings``.

Invalid values stop the start-up with one error that names each setting.
"""

from __future__ import annotations

import difflib
import importlib.util
import ipaddress
import logging
import os
from collections.abc import Iterable
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import Field, ValidationError, create_model, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.engines.kind import EngineKind, EngineSettings
from service.engines.registry import ENGINES, engine_fields, offered_engines
from service.image_hosts import ImageHost, parse_hosts
from service.quotas import QUOTA_NAMES, Quota

log = logging.getLogger(__name__)

PREFIX = "QWEN3VL_"
CLIENT_VARIABLES = frozenset({"SERVER", "API_KEY", "CA", "CERT", "KEY"})
"""Variables with the same prefix that the client commands read."""
GROUPS = {
    "host": "Address and access",
    "http_port": "HTTP API",
    "engine": "Model and engine",
    "max_images": "Limits of a request",
    "max_concurrent": "Load and time",
    "max_connections": "Connections",
    "key_concurrent": "Quotas of callers",
    "admin_port": "Admin port, tasks and reflection",
    "log_level": "Logs and traces",
}
"""First setting of each group of server settings -> title of the group."""
RENAMED = {
    "picture_pixels": "image_pixels",
    "metrics_port": "admin_port",
    "metrics_host": "admin_host",
}
"""Old names of settings, which still work with a warning -> new names."""
MIB = 1024 * 1024
DEFAULT_SLOTS = 64
"""Calls at the same time on an engine that does not say how many it decodes together."""
PROTO_OVERHEAD_BYTES = MIB
"""Bytes of a message for everything except images."""

IMAGE_FORMATS = {"jpeg": "JPEG", "png": "PNG", "webp": "WebP", "heic": "HEIC"}
"""Values of image_formats -> names of the formats."""
FILES = (
    "tls_cert",
    "tls_key",
    "tls_client_ca",
    "tls_client_names_file",
    "api_keys_file",
    "image_hosts_ca",
)
UNIX = "unix:"
KEY = "key_"
"""What the settings of quotas begin with."""
UNSERVED: dict[str, Any] = {
    "host": "127.0.0.1", "port": 0,
    **dict.fromkeys((
        "tls_cert", "tls_key", "tls_client_ca", "tls_client_names_file", "api_keys_file", "admin_port", "http_port",
        *(f"{KEY}{name}" for name in QUOTA_NAMES),
    )),
}  # fmt: skip
"""Values of the settings of access, for an engine that only this process calls."""
MAX_SOCKET_BYTES = 107
"""Maximum length of the path of a Unix socket in the kernel, in bytes."""

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
SecondsOrNever = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


class SettingsError(ValueError):
    """A setting, or a combination of settings, is invalid. The message names the setting and says
    what to do."""


class ServerSettings(BaseSettings):
    """All settings except those of an engine, with units, ranges and defaults."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    # Where the server listens.
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on; 0.0.0.0 or :: listens on every address. unix:PATH is a "
        "socket in the file system, without a port; anyone who may write to it may connect.",
    )
    port: int = Field(50051, ge=0, le=65_535, description="Port to listen on; 0 picks a free port.")
    tls_cert: Path | None = Field(None, description="Certificate chain of the server, a PEM file.")
    tls_key: Path | None = Field(None, description="Private key of tls_cert, a PEM file.")
    tls_client_ca: Path | None = Field(
        None,
        description="CA of client certificates, a PEM file; when set, callers need a certificate (mTLS).",
    )
    tls_client_names_file: Path | None = Field(
        None,
        description="File with the names of the client certificates that may call, one per line: the "
        "common name or a subject alternative name, then quotas as in api_keys_file. Unset: every "
        "certificate of tls_client_ca. Changes are used without a restart.",
    )
    api_keys_file: Path | None = Field(
        None,
        description="File with the API keys of callers, one 'name:SHA-256 of the key in hex' per "
        "line, then quotas such as 'concurrent=4 requests_per_minute=60'; when set, callers need a "
        "key. Changes are used without a restart.",
    )
    insecure: bool = Field(
        False, description="Listen beyond loopback without TLS or without API keys."
    )

    # OpenAI's API over HTTP, beside gRPC.
    http_port: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="Port of OpenAI's API over HTTP; unset: no HTTP; 0 picks a free port.",
    )
    http_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address of http_port. Certificate and API keys are those of gRPC; HTTP asks for "
        "no client certificates.",
    )
    http_origins: str = Field(
        "",
        description="Web pages that may call the HTTP API from a browser: origins such as "
        "https://example.org, with commas between them, or * for every page.",
    )
    image_hosts: str = Field(
        "",
        description="Hosts from which the HTTP API fetches images that callers name by an https URL: "
        "names with commas between them. host:port allows another port than 443; host=address "
        "connects to that address, which may be a private one, instead of a lookup. Unset: no image "
        "is fetched.",
    )
    image_hosts_ca: Path | None = Field(
        None,
        description="CAs that sign the certificates of image_hosts, a PEM file; unset: those of the "
        "system.",
    )
    image_fetch_timeout_s: Seconds = Field(
        10.0, description="Maximum time to fetch one image of image_hosts, in seconds."
    )
    playground: Literal["auto", "on", "off"] = Field(
        "auto",
        description="The page /playground of the HTTP API, for people with a browser; auto: where "
        "http_host is loopback.",
    )

    # The model and its engine.
    engine: str = Field(
        "reference",
        description="Engine that generates tokens: reference on any machine, lmdeploy on NVIDIA GPUs.",
    )
    model: str = Field(
        "bundled",
        min_length=1,
        description="'bundled', a folder, or a name on the Hugging Face hub.",
    )
    revision: str | None = Field(None, description="Commit or tag of a model from the hub.")
    # Limits of one request.
    max_images: int = Field(64, ge=1, le=1024, description="Maximum number of images in a request.")
    max_image_bytes: Positive = Field(
        20 * MIB, description="Maximum size of one encoded image, in bytes."
    )
    max_image_pixels: Positive = Field(
        64_000_000, description="Maximum number of pixels (width times height) of one image."
    )
    max_request_pixels: Positive = Field(
        800_000_000,
        description="Maximum number of pixels of all images of a request together; the default "
        "accepts 64 photos of 12 megapixels.",
    )
    image_formats: str = Field(
        "jpeg,png,webp",
        description="Accepted image formats, of jpeg, png, webp and heic, with commas between them; "
        "heic needs the extra heif.",
    )
    image_background: str = Field(
        "#ffffff",
        pattern="^#[0-9a-fA-F]{6}$",
        description="Colour behind transparent parts of images, as #rrggbb.",
    )
    jpeg_scaled_pixels: int | None = Field(
        None,
        ge=1_000_000,
        description="Number of pixels above which a JPEG image is decoded at 1/2, 1/4 or 1/8 of its "
        "sides: faster and in less memory, with slightly different pixels. Files of up to 4 "
        "times max_image_pixels are then accepted. Unset: never.",
    )
    max_message_bytes: int = Field(
        64 * MIB, ge=1024, le=2**31 - 1, description="Maximum size of a request message, in bytes."
    )
    max_text_bytes: Positive = Field(
        256 * 1024, description="Maximum size of all texts of an inline task, in bytes."
    )
    max_schema_bytes: Positive = Field(
        256 * 1024,
        description="Maximum size of a JSON Schema, EBNF grammar or list of choices, in bytes.",
    )
    max_schema_depth: Positive = Field(64, description="Maximum depth of a JSON Schema, in levels.")
    max_regex_length: Positive = Field(
        1024, description="Maximum length of a regular expression, in characters."
    )
    property_order: Literal["declared", "any"] = Field(
        "declared",
        description="Order of the properties of objects where neither the request nor the task "
        "sets one: declared (as in the JSON Schema), or any; few objects keep the declared one.",
    )
    close_objects: bool = Field(
        False,
        description="Forbid properties that a JSON Schema does not list, in objects that have "
        "properties and say nothing of others; where neither the request nor the task decides.",
    )
    schema_in_prompt: bool | None = Field(
        None,
        description="Show the JSON Schema of an answer to the model, where neither the request nor "
        "the task decides. Unset: published checkpoints see it; the bundled model and models on "
        "other servers do not.",
    )
    compile_timeout_s: Seconds = Field(
        5.0, description="Maximum time to compile a grammar, in seconds."
    )
    compile_workers: int = Field(
        2,
        ge=1,
        le=64,
        description="Number of processes that analyse grammars of callers, 75 MB each. With two "
        "processes, a grammar that hangs until its time limit does not stop other callers.",
    )
    event_loop: Literal["asyncio", "uvloop"] = Field(
        "asyncio",
        description="What runs the server: asyncio of Python, or uvloop, which takes less processor "
        "time for each call and needs its package: pip install 'qwen3vl-grpc[uvloop]'. Not for an "
        "HTTP API with TLS.",
    )
    output_retries: int = Field(
        1,
        ge=0,
        le=5,
        description="Maximum number of further attempts when an answer does not fit the schema; "
        "used where the grammar does not enforce every keyword. Further attempts at a greedy answer "
        "are sampled.",
    )

    # Concurrency and time limits.
    max_concurrent: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Maximum number of inference calls that run at the same time; further calls wait in "
        "the queue. Unset: one and a half times max_batch, or 64 for an engine without it. The engine "
        "serves what it has in order of arrival, so far more than max_batch is unfair to callers with "
        "few calls.",
    )
    max_queue: int = Field(
        256,
        ge=0,
        le=65_536,
        description="Maximum number of inference calls that wait; further calls are refused.",
    )
    max_encoded_bytes: int = Field(
        512 * MIB,
        ge=MIB,
        description="Maximum size of the encoded images of all running calls together, in bytes. "
        "Further calls wait; when as many bytes wait, calls are refused.",
    )
    max_decoding_bytes: int = Field(
        1536 * MIB,
        ge=64 * MIB,
        description="Maximum memory for decoding images, in bytes, by estimate: 4 per pixel of a PNG or "
        "baseline JPEG, 7 to 12 of a progressive JPEG, 12 of a WebP. An image that needs more than "
        "three quarters of it is refused.",
    )
    inference_timeout_s: Seconds = Field(
        300.0,
        description="Maximum time for one inference call, in seconds, including the wait in the queue.",
    )
    receive_timeout_s: Seconds = Field(
        60.0, description="Maximum time to receive one request message, in seconds."
    )
    compressed_requests: bool = Field(
        False,
        description="Accept requests that gRPC has compressed with gzip or deflate. Images do not "
        "get smaller, and a message of 64 KB can unpack to max_message_bytes.",
    )
    health_interval_s: Seconds = Field(
        5.0, description="Time between two health checks of the engine, in seconds."
    )
    unhealthy_exit_s: Seconds = Field(
        120.0,
        description="Time without progress of the engine, in seconds, after which the process ends "
        "with a non-zero exit code, so that a supervisor starts another one. Counted from the "
        "first health check that fails.",
    )
    drain_grace_s: float = Field(
        30.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="Time for running calls to finish when the server stops, in seconds.",
    )

    # Connections of the gRPC port.
    max_connections: Positive | None = Field(
        None,
        description="Maximum number of connections; further ones are closed at once. Unset: as many "
        "as the limit of file descriptors allows.",
    )
    max_streams: Positive = Field(
        1024,
        description="Maximum number of calls at the same time on one connection; a client waits "
        "with further ones. A proxy sends the calls of many clients over few connections.",
    )
    read_ahead_bytes: int = Field(
        16 * 1024,
        ge=1024,
        le=16 * MIB,
        description="Number of bytes of a request that a caller may send before the server reads it, "
        "which is after the key was checked. More of them make uploads over long distances faster, and "
        "let callers without a key take more memory.",
    )
    max_connection_idle_s: SecondsOrNever = Field(
        900.0,
        description="Time after which a connection without calls is closed, in seconds; 0 is never.",
    )
    max_connection_age_s: SecondsOrNever = Field(
        3600.0,
        description="Time after which a client is asked to open a new connection, in seconds, so "
        "that a balancer can send it to another server; calls may finish. 0 is never.",
    )

    # How much one caller may use, where callers are known by key or by certificate.
    key_concurrent: int | None = Field(
        None,
        ge=1,
        description="Maximum number of calls of one API key or client certificate at the same time, "
        "running or waiting; unset: no limit. This and the other quotas are for callers whose line "
        "in api_keys_file or tls_client_names_file sets no value of its own.",
    )
    key_queue: int | None = Field(
        None,
        ge=0,
        description="Maximum number of calls of one caller that wait in the queue; unset: no limit.",
    )
    key_requests_per_minute: int | None = Field(
        None, ge=1, description="Maximum number of inference calls of one caller in a minute."
    )
    key_megapixels_per_minute: int | None = Field(
        None,
        ge=1,
        description="Maximum number of megapixels (millions of pixels) in the images that one caller "
        "sends in a minute.",
    )
    key_tokens_per_minute: int | None = Field(
        None,
        ge=1,
        description="Maximum number of tokens of one caller in a minute, prompts and answers.",
    )

    # Optional features.
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="Port of /livez, /readyz, /metrics and /version over HTTP; 0 picks a free port; "
        "unset: these pages are not served.",
    )
    admin_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address of admin_port. Its pages are plain HTTP without API keys.",
    )
    tasks_dir: Path | None = Field(
        None, description="Folder with your own tasks, YAML or JSON files."
    )
    reflection: bool = Field(
        True, description="Offer gRPC reflection, so that grpcurl works without proto files."
    )

    # Logs, to stderr, and traces.
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Least severe log lines that are written; info has a line for each call.",
    )
    log_format: Literal["pairs", "json"] = Field(
        "pairs", description="Form of log lines: pairs (key=value), or json, one object per line."
    )
    log_every: Positive = Field(
        1, description="Log one of so many calls that succeed; calls that fail are always logged."
    )
    log_output: bool = Field(
        False,
        description="Write the raw answer of the model to the log for calls with the metadata "
        "x-log-output: 1. The log then holds what callers asked for and what they got.",
    )
    traces: bool = Field(
        False,
        description="Send OpenTelemetry traces. Environment variables of OpenTelemetry, such as "
        "OTEL_EXPORTER_OTLP_ENDPOINT, say where to. Needs the extra otel.",
    )

    @property
    def tls(self) -> bool:
        """Whether the port uses TLS."""
        return self.tls_cert is not None

    @property
    def authenticated(self) -> bool:
        """Whether callers must authenticate, by API key or certificate."""
        return self.api_keys_file is not None or self.tls_client_ca is not None

    @property
    def quota(self) -> Quota:
        """What a caller may use who has no values of its own."""
        return Quota(**{name: getattr(self, f"{KEY}{name}") for name in QUOTA_NAMES})

    @property
    def loopback(self) -> bool:
        """Whether the port can only be reached from this machine."""
        return self.socket is not None or is_loopback(self.host)

    @property
    def serves_playground(self) -> bool:
        """Whether the HTTP API has the page /playground."""
        if self.playground == "auto":
            return is_loopback(self.http_host)
        return self.playground == "on"

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        """The origins of http_origins."""
        return tuple(one.strip() for one in self.http_origins.split(",") if one.strip())

    @property
    def allowed_image_hosts(self) -> tuple[ImageHost, ...]:
        """The entries of image_hosts."""
        return parse_hosts(self.image_hosts)

    @property
    def socket(self) -> Path | None:
        """The path of the Unix socket to listen on; None for a TCP port."""
        return Path(self.host.removeprefix(UNIX)) if self.host.startswith(UNIX) else None

    @property
    def address(self) -> str:
        """The address for gRPC: ``host:port``, with IPv6 in brackets, or ``unix:PATH``."""
        if self.socket is not None:
            return f"{UNIX}{self.socket}"
        host = self.host.strip("[]")
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def accepted_formats(self) -> tuple[str, ...]:
        """``image_formats`` as names of `lmdeploy_ext.images.formats.FORMATS`."""
        return tuple(IMAGE_FORMATS[name.strip().lower()] for name in self.image_formats.split(","))

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """``image_background`` as numbers from 0 to 255."""
        red, green, blue = bytes.fromhex(self.image_background[1:])
        return red, green, blue

    @property
    def slots(self) -> int:
        """The number of inference calls that run at the same time: ``max_concurrent``, or enough for
        the engine to have the next calls ready when one ends."""
        if self.max_concurrent is not None:
            return self.max_concurrent
        rows = self.engine_settings.rows
        return DEFAULT_SLOTS if rows is None else rows + max(1, rows // 2)

    @property
    def engine_settings(self) -> EngineSettings:
        """The settings of the chosen engine, with its defaults."""
        given = {name: getattr(self, name) for name in engine_fields() if self._is_given(name)}
        return ENGINES[self.engine].settings(**given)

    def _is_given(self, name: str) -> bool:
        return name in self.model_fields_set and getattr(self, name) is not None

    @field_validator("host")
    @classmethod
    def _socket_path(cls, host: str) -> str:
        if host.startswith(UNIX):
            path = Path(host.removeprefix(UNIX))
            if not path.name or len(os.fsencode(path)) > MAX_SOCKET_BYTES:
                raise ValueError(f"unix: needs a path of 1 to {MAX_SOCKET_BYTES} bytes")
            if not path.parent.is_dir():
                raise ValueError(f"there is no folder {path.parent}")
            if path.exists() and not path.is_socket():
                raise ValueError(f"{path} exists and is not a socket")
        return host

    @field_validator("image_hosts")
    @classmethod
    def _hosts(cls, hosts: str) -> str:
        parse_hosts(hosts)
        return hosts

    @field_validator("event_loop")
    @classmethod
    def _check_event_loop(cls, name: str) -> str:
        if name == "uvloop" and importlib.util.find_spec("uvloop") is None:
            raise ValueError("uvloop is not installed: pip install 'qwen3vl-grpc[uvloop]'")
        return name

    @field_validator("image_formats")
    @classmethod
    def _known_formats(cls, formats: str) -> str:
        names = [name.strip().lower() for name in formats.split(",")]
        for name in names:
            if name not in IMAGE_FORMATS:
                raise ValueError(
                    f"there is no format {name!r}; there are {', '.join(IMAGE_FORMATS)}"
                )
        if "heic" in names and importlib.util.find_spec("pi_heif") is None:
            raise ValueError("heic needs the extra heif: pip install 'qwen3vl-grpc[heif]'")
        return formats

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, name: str) -> str:
        if name not in ENGINES:
            raise ValueError(
                f"there is no engine {name!r}; there are {', '.join(offered_engines())}"
            )
        return name

    def _check_http_access(self) -> None:
        """Raise ``ValueError`` where the HTTP port would let in callers that gRPC keeps out."""
        if self.api_keys_file is None and self.tls_client_ca is not None:
            raise ValueError(
                "http_port: HTTP asks for no client certificates, so it needs api_keys_file where "
                "tls_client_ca is set. Set insecure=true to do without"
            )
        if not is_loopback(self.http_host) and not (self.tls and self.api_keys_file is not None):
            raise ValueError(
                f"http_host: {self.http_host} can be reached from other machines, which needs TLS "
                "(tls_cert, tls_key) and API keys (api_keys_file). Set insecure=true to do without, "
                "behind a gateway that does both"
            )

    @model_validator(mode="after")
    def _of_the_engine(self) -> ServerSettings:
        """Refuse settings that have no effect on the chosen engine."""
        own = ENGINES[self.engine].settings
        for name, owners in sorted(engine_fields().items()):
            if name not in own.model_fields and self._is_given(name):
                names = ", ".join(f"engine={kind.name}" for kind, _ in owners if kind.offered)
                raise ValueError(f"{name}: {own.why_not(name) or f'is a setting of {names}'}")
        try:
            self.engine_settings  # noqa: B018
        except ValidationError as error:
            found = error.errors()[0]
            raise ValueError(_line(found["loc"], found["msg"])) from None
        return self

    @model_validator(mode="after")
    def _combinations(self) -> ServerSettings:
        if self.socket is not None and "port" in self.model_fields_set:
            raise ValueError("port: has no effect beside host=unix:PATH; leave one of them out")
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_cert"
            raise ValueError(
                f"{missing}: tls_cert and tls_key belong together, set both or neither"
            )
        if self.tls_client_ca is not None and not self.tls:
            raise ValueError("tls_client_ca: needs tls_cert and tls_key")
        if self.tls_client_names_file is not None and self.tls_client_ca is None:
            raise ValueError("tls_client_names_file: needs tls_client_ca")
        for name in FILES:
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name}: there is no file {path}")
        if self.tasks_dir is not None and not self.tasks_dir.is_dir():
            raise ValueError(f"tasks_dir: there is no folder {self.tasks_dir}")
        if not (self.loopback or self.insecure or (self.tls and self.authenticated)):
            raise ValueError(
                f"host: {self.host} can be reached from other machines, which needs TLS "
                "(tls_cert, tls_key) and callers that prove who they are (api_keys_file or "
                "tls_client_ca). Set insecure=true to do without, behind a gateway that does both"
            )
        if self.http_port is not None and self.tls and self.event_loop != "asyncio":
            raise ValueError(
                f"event_loop: {self.event_loop} cannot encrypt the HTTP API (http_port with tls_cert); "
                "take asyncio, or end TLS in front of this server"
            )
        if self.http_port is not None and not self.insecure:
            self._check_http_access()
        for name in QUOTA_NAMES:
            if getattr(self, f"{KEY}{name}") is not None and not self.authenticated:
                raise ValueError(
                    f"{KEY}{name}: needs api_keys_file or tls_client_ca, which tell callers apart"
                )
        if self.max_message_bytes < self.max_image_bytes + PROTO_OVERHEAD_BYTES:
            raise ValueError(
                "max_message_bytes: must be at least max_image_bytes plus "
                f"{PROTO_OVERHEAD_BYTES} bytes for the rest of the request"
            )
        if (self.jpeg_scaled_pixels or 0) > self.max_image_pixels:
            raise ValueError(
                f"jpeg_scaled_pixels: must be at most max_image_pixels, {self.max_image_pixels}"
            )
        for name, least in (
            ("max_request_pixels", "max_image_pixels"),
            ("max_encoded_bytes", "max_image_bytes"),
        ):
            if getattr(self, name) < getattr(self, least):
                raise ValueError(f"{name}: must be at least {least}, {getattr(self, least)}")
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a port at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _with_engines() -> type[ServerSettings]:
    """A settings class with the server's settings and, as optional fields, those of every
    engine."""
    fields: dict[str, Any] = {}
    for name, owners in engine_fields().items():
        offered = [field for kind, field in owners if kind.offered]
        field = copy(offered[0])
        defaults = [one.default for one in offered]
        if defaults != [field.default] * len(defaults):
            field.default, field.description = None, _with_defaults(owners)
        fields[name] = (_either([one.annotation for one in offered]) | None, field)
    return create_model("Settings", __base__=ServerSettings, **fields)


def _with_defaults(owners: list[tuple[EngineKind, FieldInfo]]) -> str:
    """The description of a setting whose default depends on the engine."""
    each = (f"{_plain(field.default)} with {kind.name}" for kind, field in owners if kind.offered)
    return f"{owners[0][1].description} Default: {', '.join(each)}."


def _plain(value: object) -> str:
    """A default as text; large numbers of bytes also in MiB."""
    if isinstance(value, int) and value >= MIB and value % MIB == 0:
        return f"{value} ({value // MIB} MiB)"
    return str(value)


def setting_groups() -> dict[str, str]:
    """Setting -> the title of its group in ``qwen3vl serve --help``."""
    found, title = {}, ""
    for name in Settings.model_fields:
        title = GROUPS.get(name, title)
        found[name] = title
    for name, owners in engine_fields().items():
        names = [kind.name for kind, _ in owners if kind.offered]
        every = names == offered_engines()
        found[name] = "Engine" if every else f"Only with --engine {' or '.join(names)}"
    return found


def _either(annotations: list[Any]) -> Any:
    """The common type of a setting that several engines have; literals are merged."""
    if all(get_origin(one) is Literal for one in annotations):
        return Literal[tuple(dict.fromkeys(v for one in annotations for v in get_args(one)))]
    return annotations[0]


if TYPE_CHECKING:
    Settings = ServerSettings
else:
    Settings = _with_engines()


def load_settings(**values: Any) -> Settings:
    """Load the settings: given values first, then the environment, then the defaults.

    Raises ``SettingsError`` with one line for each invalid setting. Environment variables that look
    like a misspelt setting are logged.
    """
    for name, meant in misspelt(os.environ):
        log.warning("%s is not a setting and has no effect; did you mean %s?", name, meant)
    for old, new in RENAMED.items():
        variable = f"{PREFIX}{old.upper()}"
        given = next((os.environ[name] for name in os.environ if name.upper() == variable), None)
        if given is not None:
            log.warning("%s is now called %s%s", variable, PREFIX, new.upper())
            values.setdefault(new, given)
    try:
        return Settings(**values)
    except ValidationError as error:
        lines = [_line(found["loc"], found["msg"]) for found in error.errors()]
    raise SettingsError("\n".join(lines))


def misspelt(environment: Iterable[str]) -> list[tuple[str, str]]:
    """Environment variables that are similar to a setting -> the name of that setting.

    Other variables with the prefix may be set by the environment: Kubernetes sets
    ``<SERVICE>_SERVICE_HOST``, …
    """
    known = {name.upper() for name in (*Settings.model_fields, *RENAMED)}
    given = {name.upper().removeprefix(PREFIX): name for name in environment if _ours(name)}
    found = []
    for short in sorted(given.keys() - known - CLIENT_VARIABLES):
        close = difflib.get_close_matches(short, sorted(known), n=1, cutoff=0.8)
        found += [(given[short], PREFIX + meant) for meant in close]
    return found


def _ours(variable: str) -> bool:
    return variable.upper().startswith(PREFIX)


def _line(location: tuple[int | str, ...], message: str) -> str:
    text = message.removeprefix("Value error, ")
    return f"{location[0]}: {text}" if location else text
