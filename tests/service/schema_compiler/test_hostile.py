"""Grammars made to do harm are used or refused with a reason, in time, and cost bounded memory."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import AsyncIterator, Iterator

import psutil
import pytest
import pytest_asyncio

from service.errors import GrammarError
from service.structured_output.pool import GrammarPool
from tests.service.schema_compiler.hostile import HOSTILE, Hostile
from tests.service.structured_output.child import ROOT, Child, Died

LIMIT_S = 5.0
"""What the service gives an analysis."""
SLACK_S = 60.0
"""The machine may be busy, and a process that was killed has to come up again."""
WORKER_MIB = 1024
DOCUMENTED = frozenset(
    re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
)
UNBOUNDED = "could not be validated in bounded time"
"""Of an answer that is not given out, though the grammar allows it: the schema refers twice to what
refers twice to …, which the library follows."""

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pool() -> AsyncIterator[GrammarPool]:
    started = GrammarPool(workers=1, timeout_s=LIMIT_S)
    await started.start()
    yield started
    await started.close()


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    started = Child()
    yield started
    started.close()


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.name)
async def test_used_or_refused_in_time(pool: GrammarPool, case: Hostile) -> None:
    began = time.monotonic()
    refusal: GrammarError | None = None
    try:
        analysed = await pool.analyse(case.grammar, case.limits)
    except GrammarError as error:
        refusal = error
    else:
        assert analysed.report.ebnf_bytes == len(analysed.grammar.ebnf.encode()) > 0
    if refusal is not None:
        assert refusal.reason in DOCUMENTED
        assert all(one.field.startswith("grammar") for one in refusal.violations)
        assert not re.search(r", line \d|Traceback|\.(py|cc|h)\b", refusal.message), refusal.message
    assert time.monotonic() - began < LIMIT_S + SLACK_S
    for pid in pool.pids:
        with contextlib.suppress(psutil.NoSuchProcess):  # killed at the limit, and not replaced yet
            assert psutil.Process(pid).memory_info().rss < WORKER_MIB << 20


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.name)
async def test_texts_keep_what_was_promised(child: Child, case: Hostile) -> None:
    try:
        outcome = child.outcome(case.grammar, LIMIT_S + SLACK_S, case.limits, walks=4)
    except Died as death:
        if "hangs" not in str(death):  # which the pool ends
            raise
        return
    assert [why for _, why in outcome.wrong if UNBOUNDED not in why] == []
