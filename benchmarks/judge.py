"""A second opinion on answers: jsonschema and the standard library, none of our code.

Numbers are the decimals that are written, in the schema and in the answer: jsonschema on floats divides
by a ``multipleOf`` in binary64, for which 0.07 is not a multiple of 0.01.

``python -m benchmarks.judge`` reads lines ``[schema, text]``, both as JSON text, and writes a verdict for
each.
"""

from __future__ import annotations

import asyncio
import json
import sys
from fractions import Fraction
from typing import Any

LIMIT_S = 10.0
MAX_EXPONENT = 5_000
"""Of ten; more would be written out by ``Fraction``."""


class Unknown(Exception):
    """There is no verdict."""


def judged(schema: str, text: str) -> str:
    """``valid``, ``invalid``, or ``unknown`` where jsonschema cannot say.

    schema, text: as JSON text.

    ``format`` may be an annotation or an assertion: invalid is what is so in both readings, which
    differ in what ``not`` makes of it.
    """
    import re

    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse)
        # No halves of surrogate pairs, and no number that overflowed to infinity.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return "invalid"
    try:
        value, readings = exact(text), validators(exact(schema))
        return "valid" if any(one.is_valid(value) for one in readings) else "invalid"
    except (Unknown, re.error, RecursionError):
        return "unknown"


def exact(text: str) -> Any:
    """A JSON value whose numbers with a point or an exponent are fractions. Raises ``Unknown``."""
    return json.loads(text, parse_float=_fraction)


def _fraction(digits: str) -> Fraction:
    if abs(int(digits.lower().partition("e")[2] or 0)) > MAX_EXPONENT:
        raise Unknown
    return Fraction(digits)


def validators(schema: Any) -> tuple[Any, Any]:
    """The validators of a schema that was read by ``exact``: one takes ``format`` for an annotation,
    one for an assertion."""
    import jsonschema
    from jsonschema.validators import validator_for

    cls = on_fractions(validator_for(schema, default=jsonschema.Draft202012Validator))
    return cls(schema), cls(schema, format_checker=cls.FORMAT_CHECKER)


def on_fractions(cls: Any) -> Any:
    """A class of validators, for values with fractions in place of floats."""
    from jsonschema.validators import extend

    types = cls.TYPE_CHECKER
    if types.is_type(1.0, "integer"):  # in draft-04 it is not
        types = types.redefine("integer", _is_integer)
    return extend(cls, type_checker=types)


def _is_integer(_: object, value: object) -> bool:
    whole = isinstance(value, (int, Fraction)) and value.denominator == 1
    return whole and not isinstance(value, bool)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


class Judge:
    """The same in a process that is killed where it does not come to an end."""

    def __init__(self) -> None:
        self._child: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def verdict(self, schema: str, text: str) -> str:
        async with self._lock:
            if self._child is None:
                self._child = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "benchmarks.judge", limit=1 << 24,
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                )  # fmt: skip
            assert self._child.stdin is not None
            assert self._child.stdout is not None
            self._child.stdin.write(json.dumps([schema, text]).encode() + b"\n")
            try:
                await self._child.stdin.drain()
                line = await asyncio.wait_for(self._child.stdout.readline(), LIMIT_S)
            except (asyncio.TimeoutError, ConnectionError):
                line = b""
            if not line:
                await self._end()
                return "unknown"
            return line.decode().strip()

    async def _end(self) -> None:
        assert self._child is not None
        if self._child.returncode is None:
            self._child.kill()
        await self._child.wait()
        self._child = None

    async def close(self) -> None:
        """End the process."""
        if self._child is not None:
            await self._end()


if __name__ == "__main__":
    for line in sys.stdin:
        print(judged(*json.loads(line)), flush=True)
