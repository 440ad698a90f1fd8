"""Who makes a call, how much of the server that caller may use, and how much of it is used."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

from service.errors import (
    InferenceTimeout,
    NoUsableFields,
    OutputInvalid,
    OutputTruncated,
    Overloaded,
    QuotaExceeded,
    ServiceError,
)

UNLIMITED = "unlimited"
"""In place of a number: no bound, whatever the server's default is."""
MINUTE_S = 60.0
MAX_VALUE = 10**12
LEAST_RATE = 1e-4
"""Per minute: one in a week."""
SMOOTHING = 0.1
"""Weight of the newest call in the running mean of call times."""
RETRY_MIN_S = 0.1
RETRY_MAX_S = 86_400.0
"""Longest time after which a caller is told to come again."""
ROUNDING_S = 1e-6
"""A caller that comes at the very time it was told is not refused for a rounding error."""
KEPT_ACCOUNTS = 4096
"""Accounts of callers above which those that owe nothing are forgotten, then the one without a call
whose last call began the longest ago."""

jitter = random.Random()


@dataclass(frozen=True, slots=True)
class Quota:
    """Upper bounds for the calls of one caller; None is no bound.

    The amount of one minute of a rate may be used at once.

    Attributes:
        concurrent: calls in the server at the same time, from before their bodies are read.
        queue: calls that wait for a slot.
        requests_per_minute: calls of inference.
        megapixels_per_minute: millions of pixels of images as they are sent.
        tokens_per_minute: tokens of prompts and answers together.
    """

    concurrent: int | None = None
    queue: int | None = None
    requests_per_minute: float | None = None
    megapixels_per_minute: float | None = None
    tokens_per_minute: float | None = None


UNBOUNDED = Quota()


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a call.

    name: of the API key or the client certificate. quota: None where nothing is bounded.
    """

    name: str
    quota: Quota | None = None


ANONYMOUS = Caller("-")
"""The caller of every call to a server that asks for no key and no certificate."""

LEAST = {"concurrent": 1, "queue": 0}
"""Quotas that are whole numbers, and the lowest value of each."""
QUOTA_NAMES = tuple(field.name for field in fields(Quota))


def read_quota(words: Sequence[str], default: Quota) -> Quota | None:
    """A quota from words such as ``concurrent=4``; what no word sets is as in ``default``.

    None where nothing is bounded. Raises ``ValueError`` with the word that is wrong and what is
    allowed.
    """
    found: dict[str, float | None] = {}
    for number, word in enumerate(words, start=1):
        name, equals, value = word.partition("=")
        if name not in QUOTA_NAMES or not equals:
            # What stands there may be a key: it is not repeated.
            shown = f"{name}=…" if equals and name.isidentifier() else f"word {number}"
            raise ValueError(
                f"{shown} is not a quota; allowed: {', '.join(f'{n}=' for n in QUOTA_NAMES)}"
            )
        if name in found:
            raise ValueError(f"{name} is set twice")
        found[name] = None if value == UNLIMITED else _number(name, value)
    given = {name: getattr(default, name) for name in QUOTA_NAMES}
    quota = Quota(**{**given, **found})
    return quota if quota != UNBOUNDED else None


def _number(name: str, text: str) -> float:
    least = LEAST.get(name)
    try:
        value: float = int(text) if least is not None else float(text)
    except ValueError:
        value = math.nan
    if not (LEAST_RATE if least is None else least) <= value <= MAX_VALUE:
        allowed = (
            f"a number from {LEAST_RATE:g} to {MAX_VALUE:g}"
            if least is None
            else f"a whole number of at least {least}"
        )
        raise ValueError(f"{name}={text[:20]} must be {allowed}, or {UNLIMITED}")
    return value


WORDS = {
    "concurrent": "calls at the same time",
    "queue": "waiting calls",
    "requests_per_minute": "requests per minute",
    "megapixels_per_minute": "megapixels per minute",
    "tokens_per_minute": "tokens per minute",
}


def exceeded(name: str, limit: float, retry_after_s: float) -> QuotaExceeded:
    """The error of a call above a quota. name: of the field of ``Quota``."""
    shown = f"{limit:.12g}"
    return QuotaExceeded(
        f"Your quota of {shown} {WORDS[name]} is used up. Try again after the time in RetryInfo.",
        retry_after_s=min(retry_after_s, RETRY_MAX_S),
        metadata={"quota": name, "limit": shown},
    )


class Bucket:
    """A token bucket that holds one minute of its rate, and is full at first.

    What is used may be known only afterwards, so that the level may fall below 0. A use larger than
    a minute needs a full bucket. The rate is an argument of every method: it may change at any time.
    """

    __slots__ = ("_at", "_level", "_promised")

    def __init__(self) -> None:
        self._level = math.inf
        self._at = self._promised = 0.0

    def wait_s(self, amount: float, per_minute: float, now: float) -> float:
        """Seconds until an amount is there, not below 0; nothing is taken."""
        missing = min(amount, per_minute) - self._filled(per_minute, now)
        wait_s = missing * MINUTE_S / per_minute
        return wait_s if wait_s > ROUNDING_S else 0.0

    def promise_s(self, amount: float, per_minute: float, now: float) -> float:
        """When a refused call should come again, in seconds from now.

        The calls that are refused one after the other get different times, one behind the other:
        at the same time only one of them would find something. Never above two minutes.
        """
        ready = now + self.wait_s(amount, per_minute, now)
        step_s = min(amount / per_minute, 1.0) * MINUTE_S
        self._promised = min(max(ready, self._promised + step_s), max(ready, now + 2 * MINUTE_S))
        return self._promised - now

    def take(self, amount: float, per_minute: float, now: float) -> None:
        """Use an amount; a negative one is given back."""
        self._level = self._filled(per_minute, now) - amount

    def full(self, per_minute: float, now: float) -> bool:
        """Whether nothing is owed."""
        return self._filled(per_minute, now) >= per_minute

    def _filled(self, per_minute: float, now: float) -> float:
        gained = (now - self._at) * per_minute / MINUTE_S
        self._level, self._at = min(per_minute, self._level + gained), now
        return self._level


class Account:
    """What one caller uses.

    quota: of its latest call. calls: in the server. uses: calls among them whose rates are counted.
    """

    __slots__ = (
        "_promised", "calls", "mean_s", "megapixels", "quota", "requests", "tokens", "uses",
    )  # fmt: skip

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.calls = self.uses = 0
        self.mean_s = 1.0
        self._promised = 0.0
        self.requests, self.megapixels, self.tokens = Bucket(), Bucket(), Bucket()

    def idle(self, now: float) -> bool:
        """Whether a new account would say the same."""
        quota = self.quota
        rates = (
            (self.requests, quota.requests_per_minute),
            (self.megapixels, quota.megapixels_per_minute),
            (self.tokens, quota.tokens_per_minute),
        )
        return not (self.calls or self.uses) and all(
            rate is None or bucket.full(rate, now) for bucket, rate in rates
        )

    def enter(self, now: float) -> None:
        """Count a call. Raises ``QuotaExceeded`` where the caller has as many as it may have.

        The calls that are refused one after the other are told different times, as many in each
        mean time of a call as the caller may have calls.
        """
        limit = self.quota.concurrent
        if limit is not None and self.calls >= limit:
            step_s = max(self.mean_s / limit, RETRY_MIN_S / limit)
            earliest = now + max(step_s, RETRY_MIN_S)
            self._promised = min(max(earliest, self._promised + step_s), now + MINUTE_S)
            raise exceeded("concurrent", limit, (self._promised - now) * jitter.uniform(1, 1.25))
        self.calls += 1

    def leave(self, seconds: float) -> None:
        """A call has left the server after so many seconds."""
        self.calls -= 1
        self.mean_s += SMOOTHING * (seconds - self.mean_s)


class Use:
    """What one call uses of its caller's quota. Of a caller without one, nothing is counted."""

    def spend_pixels(self, pixels: int) -> None:
        """Count the pixels of the images, before any of them is decoded.

        Raises ``QuotaExceeded``.
        """

    def spend_tokens(self, tokens: int) -> None:
        """Count the tokens of prompt and answer, in place of those that were reserved."""


class _Counted(Use):
    __slots__ = (
        "_account", "_clock", "_generated", "_known", "_megapixels", "_quota", "_reserved",
    )  # fmt: skip

    def __init__(
        self,
        account: Account,
        tokens: int,
        generated: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        """tokens: to reserve. generated: see ``Quotas.use``. Raises ``QuotaExceeded``, and then
        nothing is used."""
        quota = account.quota
        self._account, self._quota, self._clock = account, quota, clock
        self._generated = generated
        self._megapixels = 0.0
        self._reserved = 0.0
        self._known = False  # the number of tokens
        now = clock()
        self._check("requests_per_minute", account.requests, 1, now)
        self._check("tokens_per_minute", account.tokens, tokens, now)
        self._take(account.requests, quota.requests_per_minute, 1)
        if quota.tokens_per_minute is not None:
            self._reserved = min(tokens, quota.tokens_per_minute)
            self._take(account.tokens, quota.tokens_per_minute, self._reserved)
        account.uses += 1

    def spend_pixels(self, pixels: int) -> None:
        megapixels = pixels / 1e6
        self._check("megapixels_per_minute", self._account.megapixels, megapixels, self._clock())
        self._take(self._account.megapixels, self._quota.megapixels_per_minute, megapixels)
        self._megapixels = megapixels

    def spend_tokens(self, tokens: float) -> None:
        self._take(self._account.tokens, self._quota.tokens_per_minute, tokens - self._reserved)
        self._known = True

    def give_back(self, error: BaseException) -> None:
        """Settle a call that failed.

        One that was refused for its load uses nothing, unless an earlier attempt had tokens. Errors
        that are not the caller's use the tokens that the engine reported. The others use the
        reserved tokens at least, because the engine may have worked on more than it reported.
        """
        tokens: float = self._generated()
        if isinstance(error, Overloaded) and not tokens:
            self._take(self._account.requests, self._quota.requests_per_minute, -1)
            self._take(
                self._account.megapixels, self._quota.megapixels_per_minute, -self._megapixels
            )
        if self._known:
            return
        if not isinstance(error, ServiceError) or isinstance(error, WROTE):
            tokens = max(tokens, self._reserved)
        self.spend_tokens(tokens)

    def end(self) -> None:
        """Nothing more is used."""
        self._account.uses -= 1

    def _check(self, name: str, bucket: Bucket, amount: float, now: float) -> None:
        per_minute = getattr(self._quota, name)
        if per_minute is not None and bucket.wait_s(amount, per_minute, now) > 0:
            raise exceeded(name, per_minute, bucket.promise_s(amount, per_minute, now))

    def _take(self, bucket: Bucket, per_minute: float | None, amount: float) -> None:
        if per_minute is not None and amount:
            bucket.take(amount, per_minute, self._clock())


WROTE = (OutputTruncated, OutputInvalid, NoUsableFields, InferenceTimeout)
"""Errors of calls for which the engine may have worked."""
UNCOUNTED = Use()


def _nothing() -> None:
    """The end of a call that is not counted."""


class Quotas:
    """The accounts of all callers of a process. Lives on one event loop.

    clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    def enter(self, caller: Caller) -> Callable[[], None]:
        """Count a call of a caller, from before its body is read until the returned function is
        called, which may be called again. Raises ``QuotaExceeded``."""
        if caller.quota is None:
            return _nothing
        account = self._account(caller.name, caller.quota)
        began = self._clock()
        account.enter(began)
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                account.leave(self._clock() - began)

        return leave

    @contextmanager
    def use(
        self, caller: Caller, max_tokens: int, generated: Callable[[], int] = int
    ) -> Iterator[Use]:
        """Count what one call uses of the rates.

        max_tokens: what is reserved of the tokens, until ``Use.spend_tokens``. generated: tells the
        tokens of prompts and answers so far, for a call that fails; by default 0. Raises
        ``QuotaExceeded``.
        """
        quota = caller.quota
        if quota is None:
            yield UNCOUNTED
            return
        use = _Counted(self._account(caller.name, quota), max_tokens, generated, self._clock)
        try:
            yield use
        except BaseException as error:
            use.give_back(error)
            raise
        finally:
            use.end()

    def _account(self, name: str, quota: Quota) -> Account:
        account = self._accounts.pop(name, None)
        if account is None:
            if len(self._accounts) >= KEPT_ACCOUNTS:
                self._forget()
            account = Account(quota)
        account.quota = quota
        self._accounts[name] = account  # at the end: the order is that of the latest calls
        return account

    def _forget(self) -> None:
        """Make room for an account. Accounts with calls stay: the server bounds the calls."""
        now = self._clock()
        kept = {name: one for name, one in self._accounts.items() if not one.idle(now)}
        if len(kept) >= KEPT_ACCOUNTS:
            open_calls = ((name, one.calls or one.uses) for name, one in kept.items())
            oldest = next((name for name, count in open_calls if not count), None)
            if oldest is not None:
                del kept[oldest]
        self._accounts = kept
