"""An answer that is read ahead of its reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from service.inference.ahead import ahead


async def test_a_source_that_is_cancelled_ends_its_reader() -> None:
    """As where the engine cancels what a call waits for."""

    async def source() -> AsyncGenerator[str, None]:
        yield "first"
        raise asyncio.CancelledError

    found: list[str] = []

    async def read() -> None:
        async for item in ahead(source()):
            found.append(item)

    reading = asyncio.create_task(read())
    done, _ = await asyncio.wait([reading], timeout=60)
    reading.cancel()
    assert done, "the reader waits for ever"
    assert reading.cancelled()
    assert found == ["first"]


async def test_an_error_of_the_source_comes_after_its_items() -> None:
    async def source() -> AsyncGenerator[str, None]:
        yield "first"
        raise ValueError("broken")

    found: list[str] = []

    async def read() -> None:
        async for item in ahead(source()):
            found.append(item)

    with pytest.raises(ValueError, match="broken"):
        await read()
    assert found == ["first"]
