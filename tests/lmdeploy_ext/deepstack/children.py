"""Child's side: requests through the stock engine with DeepStack, with faults put in or among cancelled ones."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from tests.host_runtime.answers import answers
from tests.host_runtime.cases import Case
from tests.lmdeploy_ext.deepstack.faults import FAULTS


def faulty_answers(
    checkpoint: str,
    cases: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
    faults: Sequence[str],
) -> dict[str, list[dict[str, Any]]]:
    """The answers under each fault, each on a new engine."""
    import lmdeploy_ext
    from lmdeploy_ext.deepstack import features

    lmdeploy_ext.install("require")
    found = {}
    for name in faults:
        with FAULTS[name](features, features.Features._add):
            (found[name],) = answers(checkpoint, cases, [run])
    return found


def answers_among_cancelled(
    checkpoint: str, cases: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], rounds: int
) -> list[list[dict[str, Any]]]:
    """All cases at once, every other one cancelled at some time; the answers of the others."""
    import random

    import lmdeploy_ext

    lmdeploy_ext.install("require")
    return asyncio.run(
        _among_cancelled(
            checkpoint, [Case.from_json(c) for c in cases], settings, rounds, random.Random(4)
        )
    )


async def _among_cancelled(
    checkpoint: str, cases: Sequence[Case], settings: Mapping[str, Any], rounds: int, source: Any
) -> list[list[dict[str, Any]]]:
    from tests.host_runtime import engines
    from tests.host_runtime.answers import ask

    engine = engines.turbomind(checkpoint, **settings)
    found = []
    for _ in range(rounds):
        kept = [asyncio.create_task(ask(engine, case, source.random() * 0.2)) for case in cases]
        dropped = [asyncio.create_task(ask(engine, case, source.random() * 0.2)) for case in cases]
        for task in dropped:
            asyncio.get_running_loop().call_later(source.random() * 0.4, task.cancel)
        await asyncio.gather(*dropped, return_exceptions=True)
        found.append([vars(answer) for answer in await asyncio.gather(*kept)])
        assert any(task.cancelled() for task in dropped)
    await engines.stop(engine)
    return found
