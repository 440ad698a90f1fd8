"""Who makes a call, and how much of the server that caller may use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quota:
    """Upper bounds for the calls of one caller; None is no bound.

    concurrent: calls in the server at the same time, running or waiting. queue: calls that wait for a
    slot. The rates count calls of inference, pixels of images as they are sent, and tokens of prompts
    and answers together; one minute of a rate may be used at once.
    """

    concurrent: int | None = None
    queue: int | None = None
    requests_per_minute: float | None = None
    megapixels_per_minute: float | None = None
    tokens_per_minute: float | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call.

    name: of the API key or the client certificate. quota: None where nothing is bounded.
    """

    name: str
    quota: Quota | None = None


ANONYMOUS = Caller("-")
"""The caller of every call to a server that asks for no key and no certificate."""
