"""Settings of the Ray engine. This module does not import Ray."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy
from typing import Any, ClassVar

from pydantic import Field, ValidationError, create_model, field_validator, model_validator

from service.engines.kind import MIB, EngineKind, EngineSettings

DEFAULT_ONGOING = 64
"""Requests at the same time on a replica whose engine does not say how many it decodes together."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class RaySettings(EngineSettings):
    """Settings of the Ray engine for operators; each becomes a flag and a variable.

    `settings_over` adds the settings of the engines that may run in replicas.
    """

    inner_kinds: ClassVar[tuple[EngineKind, ...]] = ()
    """The engines that may run in replicas."""

    ray_engine: str = Field("reference", description="Engine of the replicas.")
    ray_address: str | None = Field(
        None,
        min_length=1,
        description="Address of a running Ray cluster, HOST:PORT, or auto for the one of this "
        "machine; unset: this server starts its own Ray on this machine, and ends it.",
    )
    ray_name: str = Field(
        "qwen3vl",
        description="Name of the deployment. Servers with the same name and the same settings share "
        "its replicas.",
    )
    ray_replicas: int = Field(
        1, ge=1, le=1024, description="Number of replicas; the least of them with ray_max_replicas."
    )
    ray_max_replicas: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Maximum number of replicas, which Ray starts and ends with the load; unset: "
        "always ray_replicas.",
    )
    ray_gpus: float | None = Field(
        None,
        ge=0,
        le=64,
        allow_inf_nan=False,
        description="GPUs of each replica: a whole number, or a part of one, such as 0.5. Unset: as "
        "many as the engine takes: tensor_parallel with lmdeploy, none with reference on a CPU.",
    )
    ray_cpus: float = Field(
        1.0,
        ge=0,
        le=1024,
        allow_inf_nan=False,
        description="CPUs of each replica, by which Ray places it. They do not bound its threads.",
    )
    ray_ongoing: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Maximum number of requests on one replica at the same time; further ones wait "
        f"in the servers. Unset: one and a half times max_batch, or {DEFAULT_ONGOING}.",
    )
    ray_target_ongoing: float | None = Field(
        None,
        gt=0,
        le=65_536,
        allow_inf_nan=False,
        description="With ray_max_replicas: number of requests on each replica that Ray aims at. "
        "Unset: two thirds of ray_ongoing.",
    )
    ray_text_delay_s: float = Field(
        0.02,
        ge=0,
        le=10,
        allow_inf_nan=False,
        description="Maximum time for which a replica collects text before it sends it, in seconds. "
        "The first text of an answer is sent at once.",
    )
    ray_start_s: float = Field(
        600.0,
        gt=0,
        le=86_400,
        allow_inf_nan=False,
        description="Maximum time to wait for the first replica at the start, in seconds.",
    )
    ray_linger_s: float = Field(
        60.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="With ray_address: time for which replicas stay after the last server that used "
        "them ended, in seconds, so that a restarted server finds its models loaded.",
    )
    ray_store_bytes: int = Field(
        256 * MIB,
        ge=80 * MIB,
        description="Without ray_address: shared memory for images on their way to replicas, in "
        "bytes. What does not fit goes to a private folder on disk.",
    )

    @field_validator("ray_engine")
    @classmethod
    def _known_engine(cls, name: str) -> str:
        if name not in {kind.name for kind in cls.inner_kinds}:
            offered = ", ".join(kind.name for kind in cls.inner_kinds if kind.offered)
            raise ValueError(f"replicas can run {offered}, not {name!r}")
        return name

    @field_validator("ray_name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("needs 1 to 64 letters, digits, - or _")
        return name

    @field_validator("ray_gpus")
    @classmethod
    def _whole_gpus(cls, number: float | None) -> float | None:
        if number is not None and number > 1 and number != int(number):
            raise ValueError("more than one GPU must be a whole number of them")
        return number

    @model_validator(mode="after")
    def _combinations(self) -> RaySettings:
        if self.ray_max_replicas is not None and self.ray_max_replicas < self.ray_replicas:
            raise ValueError(
                f"ray_max_replicas: must be at least ray_replicas, {self.ray_replicas}"
            )
        if self.ray_max_replicas is None and self.ray_target_ongoing is not None:
            raise ValueError("ray_target_ongoing: has no effect without ray_max_replicas")
        if self.ray_address is None and "ray_linger_s" in self.model_fields_set:
            raise ValueError("ray_linger_s: has no effect without ray_address")
        if self.ray_address is not None and "ray_store_bytes" in self.model_fields_set:
            raise ValueError(
                "ray_store_bytes: is set where the cluster of ray_address is started, with "
                "ray start --object-store-memory"
            )
        self.inner_settings()
        return self

    @property
    def inner_kind(self) -> EngineKind:
        """The engine of the replicas."""
        return next(kind for kind in self.inner_kinds if kind.name == self.ray_engine)

    def inner_settings(self) -> EngineSettings:
        """The settings of the engine of the replicas.

        Raises ``ValueError`` for a setting that it does not have, or with another range.
        """
        own = self.inner_kind.settings
        given = {
            name: getattr(self, name)
            for name in self.model_fields_set & (self.passed_on | {"vision"})
        }
        for name in sorted(given):
            if name not in own.model_fields:
                text = own.why_not(name) or f"is not a setting of ray_engine={self.ray_engine}"
                raise ValueError(f"{name}: {text}")
        try:
            return own(**given)
        except ValidationError as error:
            found = error.errors()[0]
            text = found["msg"].removeprefix("Value error, ")
            place = f"{found['loc'][0]}: " if found["loc"] else ""
            raise ValueError(f"{place}{text}") from None

    @property
    def ongoing(self) -> int:
        """Maximum number of requests on one replica at the same time."""
        if self.ray_ongoing is not None:
            return self.ray_ongoing
        rows = self.inner_settings().rows
        return DEFAULT_ONGOING if rows is None else rows + max(1, rows // 2)

    @property
    def target_ongoing(self) -> float:
        """Number of requests on each replica that Ray aims at when it scales."""
        return self.ray_target_ongoing or max(1.0, self.ongoing * 2 / 3)

    @property
    def gpus(self) -> float:
        """GPUs of each replica."""
        if self.ray_gpus is not None:
            return self.ray_gpus
        return self.inner_settings().gpus

    @property
    def rows(self) -> int | None:
        """Number of requests that all replicas decode together."""
        rows = self.inner_settings().rows
        if rows is None:
            rows = max(1, self.ongoing * 2 // 3)
        return rows * (self.ray_max_replicas or self.ray_replicas)


def settings_over(kinds: Sequence[EngineKind]) -> type[RaySettings]:
    """`RaySettings` with the settings of these engines, all of them unset."""
    fields: dict[str, Any] = {}
    for kind in kinds:
        for name, field in kind.settings.model_fields.items():
            if name not in EngineSettings.model_fields and name not in fields:
                fields[name] = (Any, copy(field))
                fields[name][1].default = None
                fields[name][1].metadata = []  # the engine's own model validates the value
    made: type[RaySettings] = create_model("RaySettings", __base__=RaySettings, **fields)
    made.inner_kinds = tuple(kinds)
    made.passed_on = frozenset(fields)
    return made
