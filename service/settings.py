"""Settings of the server: environment variables ``QWEN3VL_…``, or arguments of ``Settings``.

Wrong values end the start with one readable error that names the setting.
"""

from __future__ import annotations

import difflib
import ipaddress
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

log = logging.getLogger(__name__)

PREFIX = "QWEN3VL_"
CLIENT_VARIABLES = frozenset({"SERVER", "API_KEY", "CA"})
"""Variables with our prefix that the commands of a caller read."""
LMDEPLOY_SETTINGS = frozenset(
    {"backend", "deepstack", "tensor_parallel", "model_format", "cache_share", "cache_type", "prefix_caching",
     "prefill_chunk", "picture_pixels", "vision_batch"}
)  # fmt: skip
"""What only the LMDeploy engine has; refused with another one."""
MIB = 1024 * 1024
PROTO_OVERHEAD_BYTES = MIB
"""Room in a message for everything that is not a picture."""

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class SettingsError(ValueError):
    """A setting, or a combination of settings, is wrong. The text names it and says what to do."""


class Settings(BaseSettings):
    """Every setting with its unit, range and default."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    # Where the server listens.
    host: str = Field(
        "127.0.0.1", description="Address to listen on; 0.0.0.0 or :: is all of them."
    )
    port: int = Field(
        50051, ge=0, le=65_535, description="Port to listen on; 0 lets the system pick."
    )
    tls_cert: Path | None = Field(None, description="Certificate chain of the server, PEM.")
    tls_key: Path | None = Field(None, description="Private key of tls_cert, PEM.")
    tls_client_ca: Path | None = Field(
        None, description="CA of client certificates, PEM; when set, callers need one (mTLS)."
    )
    api_keys_file: Path | None = Field(
        None,
        description="Keys of callers, one 'name:SHA-256 of the key in hex' per line; "
        "when set, callers need one.",
    )
    insecure: bool = Field(
        False, description="Allow to listen beyond loopback without TLS or without keys of callers."
    )

    # Which model, and how it runs.
    engine: Literal["reference", "lmdeploy", "fake"] = Field(
        "reference",
        description="What computes tokens: reference on any machine, lmdeploy on NVIDIA GPUs.",
    )
    model: str = Field(
        "bundled",
        min_length=1,
        description="'bundled', a folder, or a name on the Hugging Face hub.",
    )
    revision: str | None = Field(None, description="Commit or tag of a model from the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of the weights; auto is the checkpoint's own, but float32 for a model of "
        "at most 1 GiB on a CPU without bfloat16 instructions (AMX, AVX512-BF16). float32 is for "
        "the reference engine, float16 for lmdeploy.",
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N."
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads; unset: one per core, but one for small models.",
    )
    max_batch: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Most requests decoded together; unset: 16 on reference, 64 on lmdeploy.",
    )
    context_length: int | None = Field(
        None, ge=16, description="Most tokens of prompt and answer; unset: the model's own."
    )
    vision: bool = Field(
        True,
        description="Take pictures. Without, the vision tower is not loaded and its memory is free "
        "for more requests; a request with a picture is refused.",
    )

    # How LMDeploy runs it; settings of engine=lmdeploy alone.
    backend: Literal["auto", "turbomind", "pytorch"] = Field(
        "auto",
        description="Engine of LMDeploy: auto is turbomind, but pytorch where TurboMind cannot be "
        "given DeepStack, which pictures need: on several GPUs, or on an unknown build.",
    )
    deepstack: Literal["auto", "require", "off"] = Field(
        "auto",
        description="DeepStack on TurboMind: require ends the start where it cannot be had, off "
        "goes without, for worse answers about pictures.",
    )
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="GPUs that share the model; divides its attention heads."
    )
    model_format: Literal["auto", "hf", "awq", "gptq", "compressed-tensors", "fp8"] = Field(
        "auto", description="Format of the weights; auto reads it from config.json."
    )
    cache_share: float = Field(
        0.8,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="Share of the GPU memory left beside the weights that keys and values get.",
    )
    cache_type: Literal["none", "int8", "int4", "fp8"] = Field(
        "none",
        description="Quantisation of keys and values: none is 16 bits; int8 and fp8 take half of "
        "that, int4 a quarter. fp8: backend pytorch only.",
    )
    prefix_caching: bool = Field(
        True, description="Keep keys and values of prompts, so that equal beginnings cost nothing."
    )
    prefill_chunk: int = Field(
        8192, ge=64, le=1_048_576, description="Most prompt tokens computed in one pass."
    )
    picture_pixels: int | None = Field(
        None,
        ge=1024,
        le=2**31 - 1,
        description="Most pixels of a picture after resizing, whatever a caller asks for; 1024 "
        "pixels are one token. Unset: the checkpoint's own.",
    )
    vision_batch: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Most pictures in the engine that it has not looked at yet; more wait before "
        "it. Unset: no bound but the prefill chunk.",
    )

    # What one request may ask for.
    max_images: int = Field(64, ge=1, le=1024, description="Most pictures in a request.")
    max_image_bytes: Positive = Field(20 * MIB, description="Most bytes of one encoded picture.")
    max_image_pixels: Positive = Field(
        64_000_000, description="Most pixels (width times height) of one picture."
    )
    max_message_bytes: int = Field(
        64 * MIB, ge=1024, le=2**31 - 1, description="Most bytes of a request message."
    )
    max_text_bytes: Positive = Field(
        256 * 1024, description="Most bytes of the system and user texts of an inline task."
    )
    max_schema_bytes: Positive = Field(
        64 * 1024, description="Most bytes of a JSON Schema, EBNF grammar or choice."
    )
    max_schema_depth: Positive = Field(64, description="Most levels of nesting of a JSON Schema.")
    max_regex_length: Positive = Field(1024, description="Most characters of a regular expression.")
    compile_timeout_s: Seconds = Field(5.0, description="Most seconds to compile a grammar.")
    compile_workers: int = Field(
        2,
        ge=1,
        le=64,
        description="Processes that analyse grammars of callers, 75 MB each; with two, one that "
        "hangs until its limit leaves the other to everybody else.",
    )
    grammar_cache_bytes: Positive | None = Field(
        None,
        description="Most bytes of compiled grammars that the engine keeps; unset: 64 MiB on "
        "reference, 512 MiB on lmdeploy.",
    )
    output_retries: int = Field(
        1,
        ge=0,
        le=5,
        description="Most attempts beyond the first at an answer that fits, where the grammar does "
        "not enforce every keyword and temperature is above 0.",
    )

    # How much at a time, and for how long.
    max_concurrent: int = Field(
        64, ge=1, le=65_536, description="Most inference calls in work; more wait in the queue."
    )
    max_queue: int = Field(
        256, ge=0, le=65_536, description="Most inference calls waiting; more are refused."
    )
    inference_timeout_s: Seconds = Field(
        300.0, description="Most seconds of one inference call, the wait in the queue included."
    )
    health_interval_s: Seconds = Field(
        5.0, description="Seconds between two checks of the engine's health."
    )
    drain_grace_s: float = Field(
        30.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="Seconds that calls in flight get to finish when the server stops.",
    )

    # What it offers.
    metrics_port: int | None = Field(
        None, ge=0, le=65_535, description="Port of the metrics for Prometheus; unset: none."
    )
    metrics_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address of metrics_port: plain HTTP for whoever reaches it, without keys.",
    )
    tasks_dir: Path | None = Field(None, description="Folder of your own tasks, YAML or JSON.")
    reflection: bool = Field(
        True, description="Offer gRPC reflection, so that grpcurl needs no files."
    )

    @property
    def tls(self) -> bool:
        """Whether the port speaks TLS."""
        return self.tls_cert is not None

    @property
    def authenticated(self) -> bool:
        """Whether callers have to prove who they are, by key or by certificate."""
        return self.api_keys_file is not None or self.tls_client_ca is not None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the port."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def address(self) -> str:
        """``host:port`` as gRPC wants it; IPv6 in brackets."""
        host = self.host.strip("[]")
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @model_validator(mode="after")
    def _of_the_engine(self) -> Settings:
        """Nothing that is set may be without effect."""
        if self.engine == "lmdeploy":
            if self.dtype == "float32":
                raise ValueError("dtype: LMDeploy computes in bfloat16 or float16, not in float32")
            if self.device not in ("auto", "cuda"):
                raise ValueError(
                    "device: LMDeploy takes the first GPUs that it sees; choose them with "
                    "CUDA_VISIBLE_DEVICES, or take engine=reference for a CPU"
                )
            if self.threads is not None:
                raise ValueError("threads: is a setting of engine=reference")
            return self
        if self.dtype == "float16":
            raise ValueError("dtype: float16 is a type of engine=lmdeploy; take bfloat16")
        for name in sorted(LMDEPLOY_SETTINGS & self.model_fields_set):
            raise ValueError(f"{name}: is a setting of engine=lmdeploy")
        return self

    @model_validator(mode="after")
    def _combinations(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_cert"
            raise ValueError(
                f"{missing}: tls_cert and tls_key belong together, set both or neither"
            )
        if self.tls_client_ca is not None and not self.tls:
            raise ValueError("tls_client_ca: needs tls_cert and tls_key")
        for name in ("tls_cert", "tls_key", "tls_client_ca", "api_keys_file"):
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
        if self.max_message_bytes < self.max_image_bytes + PROTO_OVERHEAD_BYTES:
            raise ValueError(
                "max_message_bytes: must be at least max_image_bytes plus "
                f"{PROTO_OVERHEAD_BYTES} bytes for the rest of the request"
            )
        return self


def load_settings(**values: Any) -> Settings:
    """Settings from the given values, then from the environment, then the defaults.

    Raises ``SettingsError`` with one line for each wrong setting. A variable of the environment
    that looks like a misspelt setting is logged.
    """
    for name, meant in misspelt(os.environ):
        log.warning("%s is not a setting and has no effect; did you mean %s?", name, meant)
    try:
        return Settings(**values)
    except ValidationError as error:
        lines = [_line(found["loc"], found["msg"]) for found in error.errors()]
    raise SettingsError("\n".join(lines))


def misspelt(environment: Iterable[str]) -> list[tuple[str, str]]:
    """Variables that are not settings but close to one, and the one that is close.

    Others with the prefix may come from elsewhere: Kubernetes sets ``<SERVICE>_SERVICE_HOST``, …
    """
    known = {name.upper() for name in Settings.model_fields}
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
