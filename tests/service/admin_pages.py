"""Reads the pages of the admin port, as probes and Prometheus do."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Series = tuple[str, tuple[tuple[str, str], ...]]
"""Name of a sample and its labels, sorted."""


@dataclass(frozen=True)
class Answer:
    status: int
    text: str
    headers: Mapping[str, str]


def fetch(port: int | None, path: str, method: str = "GET", **headers: str) -> Answer:
    """One request over a connection of its own."""
    assert port is not None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, answer.read().decode(), found)
    finally:
        connection.close()


async def page(port: int | None, path: str, method: str = "GET", **headers: str) -> Answer:
    """``fetch`` beside the event loop that serves the page."""
    return await asyncio.to_thread(fetch, port, path, method, **headers)


async def samples(port: int | None) -> dict[Series, float]:
    """Every sample of ``/metrics`` that is ours."""
    text = (await page(port, "/metrics")).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("qwen3vl_")
    }


def series(name: str, **labels: str) -> Series:
    return f"qwen3vl_{name}", tuple(sorted(labels.items()))
