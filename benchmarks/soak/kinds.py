"""The kinds of calls of the soak, how often each comes and how it may end; a caller who makes them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from benchmarks.soak import load, over_http
from benchmarks.soak.load import Kind, World, once


def _ends(run: Callable[[World], Awaitable[None]], weight: int, *ends: str) -> Kind:
    """A kind that never ends well."""
    return Kind(run, weight, frozenset(ends), ok=False)


BUSY = frozenset({"OVERLOADED"})
KINDS = (
    Kind(load.analyze, 12, BUSY),
    Kind(load.schema, 20, BUSY),
    Kind(load.regex, 8, BUSY),
    Kind(load.photo, 2, BUSY),
    Kind(load.stream, 8, BUSY),
    Kind(load.slow_reader, 2, BUSY),
    Kind(load.cancelled_stream, 4, BUSY),
    Kind(load.cancelled_call, 4, BUSY),
    Kind(load.short_deadline, 3, BUSY | {"DEADLINE_EXCEEDED", "INFERENCE_TIMEOUT"}),
    Kind(load.unread, 1),
    Kind(load.half_sent, 1),
    _ends(
        load.bad_image,
        5,
        "IMAGE_TRUNCATED",
        "IMAGE_INVALID",
        "IMAGE_EMPTY",
        "IMAGE_FORMAT_UNSUPPORTED",
        "IMAGE_TOO_MANY_PIXELS",
    ),
    _ends(
        load.bad_request,
        5,
        "SCHEMA_INVALID",
        "SCHEMA_NOT_JSON",
        "GRAMMAR_INVALID",
        "UNKNOWN_TASK",
        "CONTEXT_TOO_LONG",
        "TEXT_EMPTY",
    ),
    _ends(load.truncated, 3, "OUTPUT_TRUNCATED", "OVERLOADED"),
    _ends(load.wrong_key, 2, "API_KEY_INVALID"),
    Kind(load.lookups, 4, BUSY),
    Kind(load.new_schema, 2, BUSY),
    Kind(load.burst, 1, BUSY),
    Kind(over_http.http_chat, 6),
    Kind(over_http.http_responses, 3),
    Kind(over_http.http_stream, 4),
    Kind(over_http.http_left, 2),
    Kind(over_http.http_unread, 1),
    Kind(over_http.http_half_sent, 1),
    Kind(over_http.http_slow_headers, 1),
    Kind(over_http.http_bad, 2),
    Kind(over_http.http_cut, 2),
    Kind(over_http.http_hostile_json, 2),
    Kind(over_http.http_smuggled, 1),
    Kind(over_http.http_wrong_key, 1),
    Kind(over_http.connect_call, 4),
    Kind(over_http.connect_stream, 2),
    Kind(over_http.connect_unread, 1),
    Kind(over_http.connect_half_sent, 1),
    Kind(over_http.connect_hostile, 2),
)
"""Hostile calls over HTTP and Connect raise ``Unexpected`` for a status that they must not get."""


async def caller(world: World, stop: asyncio.Event, pause_s: float) -> None:
    """Calls of all kinds, one after the other, with pauses of up to twice ``pause_s``."""
    weights = [kind.weight for kind in KINDS]
    while not stop.is_set():
        (kind,) = world.rng.choices(KINDS, weights)
        await once(world, kind)
        await asyncio.sleep(world.rng.random() * 2 * pause_s)
