"""Child's side of the parity tests: the answers of the stock engine with the extension to many cases."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tests.host_runtime.cases import Case
from tests.host_runtime.mutations import armed

if TYPE_CHECKING:
    from tests.host_runtime.engines import Answer


def answers(
    checkpoint: str,
    cases: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    extension: bool = True,
) -> list[list[dict[str, Any]]]:
    """Ask every case in every run.

    Args:
        cases: each of `Case.to_json`.
        runs: each a set of engine settings for a new engine. Some keys are taken out: ``together``
            sends all cases at once, at times that follow from ``shuffle``; ``rounds`` asks
            everything so many times, which matters with a prefix cache; ``fault`` names one of
            `tests.host_runtime.mutations`, and ``checkpoint`` another checkpoint; ``state`` is the
            dtype of recurrent states.
        extension: whether the extension is installed.

    Returns:
        For each run the answers of its last round, fields of `engines.Answer`.
    """
    if extension:
        import lmdeploy_ext

        lmdeploy_ext.install()
    ready = [Case.from_json(case) for case in cases]
    return [asyncio.run(_run(checkpoint, ready, dict(run))) for run in runs]


async def _run(
    checkpoint: str, cases: Sequence[Case], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    checkpoint = settings.pop("checkpoint", checkpoint)
    if state := settings.pop("state", None):
        from service.engines.lmdeploy.building import set_state_dtype

        set_state_dtype(state)
    with armed(settings.pop("fault", "")):
        return await _ask_all(checkpoint, cases, settings)


async def _ask_all(
    checkpoint: str, cases: Sequence[Case], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    from tests.host_runtime import engines  # imports LMDeploy, which is there only in a child

    together, rounds = settings.pop("together", False), settings.pop("rounds", 1)
    arrival = random.Random(settings.pop("shuffle", 0))
    engine = engines.turbomind(checkpoint, **settings)
    found: list[Answer] = []
    for _ in range(rounds):
        if together:
            delays = [arrival.random() * 0.05 for _ in cases]
            found = await asyncio.gather(
                *(ask(engine, *pair) for pair in zip(cases, delays, strict=True))
            )
        else:
            found = [await ask(engine, case) for case in cases]
    await engines.stop(engine)
    return [vars(answer) for answer in found]


def among_cancelled(
    checkpoint: str, cases: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Ask every case beside one like it that is cancelled; the answers of those that stay.

    Args:
        runs: each a set of engine settings for a new engine.

    Returns:
        For each run ``answers``, and ``phases``: where the cancelled ones were.
    """
    import lmdeploy_ext

    lmdeploy_ext.install()
    ready = [Case.from_json(case) for case in cases]
    return [asyncio.run(_among_cancelled(checkpoint, ready, dict(run))) for run in runs]


async def _among_cancelled(
    checkpoint: str, cases: Sequence[Case], settings: dict[str, Any]
) -> dict[str, Any]:
    from tests.host_runtime import engines

    engine = engines.turbomind(checkpoint, **settings)
    phases: list[str] = []
    # The first ones find an idle engine, the others a queue.
    waits = ["a moment", "a moment", "a token", *["nothing", "no time", "a token"] * len(cases)]
    # None of them ends by itself before its time.
    long = [replace(case, max_new_tokens=100) for case in [*cases, *cases]]
    dropped = [
        asyncio.create_task(_cancelled(engine, case, number, wait, phases))
        for number, (case, wait) in enumerate(zip(long, waits, strict=False))
    ]
    kept = [asyncio.create_task(ask(engine, case, 0.02 * i)) for i, case in enumerate(cases)]
    await asyncio.gather(*dropped)
    answers = [vars(answer) for answer in await asyncio.gather(*kept)]
    await engines.stop(engine)
    return {"answers": answers, "phases": phases}


async def _cancelled(engine: Any, case: Case, number: int, wait: str, phases: list[str]) -> None:
    """Send a request, wait for something, cancel it, and note where it was then."""
    from tests.host_runtime import engines

    answer = engines.Answer()
    await asyncio.sleep(0.01 * number)
    task = asyncio.create_task(ask(engine, case, answer=answer))
    for _ in range(0 if wait == "nothing" else 5):
        await asyncio.sleep(0)
    if wait == "a moment":
        await asyncio.sleep(0.001)
    while wait == "a token" and not answer.tokens:  # noqa: ASYNC110 (nobody tells)
        await asyncio.sleep(0.001)
    phases.append(
        "answering" if answer.tokens else "not sent" if wait == "nothing" else "no token yet"
    )
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(answer.tokens) < case.max_new_tokens


async def ask(engine: Any, case: Case, delay_s: float = 0, answer: Answer | None = None) -> Answer:
    from tests.host_runtime import engines

    await asyncio.sleep(delay_s)
    options = {"max_new_tokens": case.max_new_tokens, "ignore_eos": True, **case.options}
    return await engines.ask(engine, case.tokens, images=case.images(), answer=answer, **options)
