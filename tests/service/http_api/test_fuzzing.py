"""Schemathesis against the real server: requests made from the OpenAPI document, wrong ones too.

No answer is a defect, and every answer is in the document: its status, its content type, its fields, and the
events of streams. Ten minutes: FUZZ_SECONDS=600.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from service.engines.reference import ReferenceEngine
from service.wiring import BUNDLED_MODEL
from tests.service.harness import ROOT
from tests.service.http_api.harness import serving

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]

SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))
CHECKS = (
    *("no_defect", "events_fit_the_document", "status_code_conformance"),
    *("content_type_conformance", "response_schema_conformance"),
)


@pytest.mark.parametrize(
    ("phases", "only", "share"),
    [("coverage,fuzzing,stateful", (), 0.3), ("fuzzing", ("--include-method", "POST"), 0.7)],
    ids=["every method", "generation"],
)
async def test_no_defect_and_no_answer_outside_the_document(
    phases: str, only: tuple[str, ...], share: float, tmp_path: Path
) -> None:
    pytest.importorskip("schemathesis", reason="schemathesis needs Python 3.11 or newer")
    async with serving(ReferenceEngine(BUNDLED_MODEL)) as server:
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("schemathesis")),
            *("run", f"{server.http.place}/openapi.json", "--no-color"),
            *("--max-time", str(round(SECONDS * share)), "--max-examples", "100000"),
            *("--phases", phases, "--checks", ",".join(CHECKS), *only),
            *("--continue-on-failure", "--max-failures", "20"),
            *("--report", "ndjson", "--report-dir", str(tmp_path)),
            cwd=tmp_path,
            env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.service.http_api.fuzzing",
                 "PYTHONPATH": str(ROOT)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
    print(statuses(tmp_path))
    assert process.returncode == 0, output.decode()
    assert statuses(tmp_path)[200] > 10, "the requests reach the model"


def statuses(folder: Path) -> Counter[int]:
    """How often each status was the answer."""
    found: Counter[int] = Counter()
    (report,) = folder.glob("*.ndjson")
    for line in report.read_text().splitlines():
        waiting = [json.loads(line)]
        while waiting:
            one = waiting.pop()
            if isinstance(one, list):
                waiting += one
            elif isinstance(one, dict):
                waiting += one.values()
                if "status_code" in one and "headers" in one:
                    found[one["status_code"]] += 1
    return found
