"""Child's side of `fuzz`: requests at their times through one engine."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tests.host_runtime.cases import Case

if TYPE_CHECKING:
    from tests.host_runtime.engines import Answer


@dataclass(frozen=True)
class Asked:
    """A request that arrives some time after the engine's start, and perhaps is cancelled a time later."""

    case: Case
    at_s: float
    cancel_s: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Asked:
        return Asked(Case.from_json(values["case"]), values["at_s"], values["cancel_s"])


def answered(
    checkpoint: str,
    rounds: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]],
    fault: str,
) -> tuple[list[list[dict[str, Any]]], dict[str, int]]:
    """Ask each round on an engine of its own.

    Args:
        rounds: settings of the engine, and requests.

    Returns:
        The answers of each round, of cancelled requests as far as they came, and how many batches
        there were of each kind.
    """
    import lmdeploy_ext
    from lmdeploy_ext.deepstack import features
    from tests.lmdeploy_ext.deepstack.faults import FAULTS
    from tests.lmdeploy_ext.deepstack.watching import watched

    lmdeploy_ext.install("require")
    kinds: Counter[str] = Counter()
    found = []
    with ExitStack() as stack:
        stack.enter_context(watched(kinds))
        if fault:
            stack.enter_context(FAULTS[fault](features, features.Features._add))
        for settings, requests in rounds:
            asked = [Asked.from_json(one) for one in requests]
            answers = asyncio.run(_ask_all(checkpoint, asked, settings))
            found.append([vars(answer) for answer in answers])
    return found, dict(kinds)


async def _ask_all(
    checkpoint: str, requests: Sequence[Asked], settings: Mapping[str, Any]
) -> list[Answer]:
    from tests.host_runtime import engines

    engine = engines.turbomind(checkpoint, **settings)
    found = await asyncio.gather(*(_ask(engine, one) for one in requests))
    figures = await engines.idle(engine)
    assert figures["active_seqs"] == 0, "cancelled requests are gone, too"
    await engines.stop(engine)
    return list(found)


async def _ask(engine: Any, asked: Asked) -> Answer:
    from tests.host_runtime import engines

    await asyncio.sleep(asked.at_s)
    case, answer = asked.case, engines.Answer()
    task = asyncio.create_task(
        engines.ask(
            engine, case.tokens, images=case.images(), answer=answer,
            max_new_tokens=case.max_new_tokens, ignore_eos=True,
        )
    )  # fmt: skip
    if asked.cancel_s is not None:
        asyncio.get_running_loop().call_later(asked.cancel_s, task.cancel)
    await asyncio.gather(task, return_exceptions=asked.cancel_s is not None)
    return answer
