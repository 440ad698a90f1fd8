"""``lmdeploy`` with a scripted engine in TurboMind's place: ``python -m tests.lmdeploy_ext.vision_off.scripted …``.

Everything in front of the engine is LMDeploy's own: command line, application, `AsyncEngine`,
tokenizer, chat template. The engine answers every request with the same tokens and writes what it
was given, one JSON line a request, to the file named by ``SCRIPTED_LOG``. ``SCRIPTED_STOCK`` leaves
the extension out.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from lmdeploy.messages import EngineOutput, ResponseType, ScheduleMetrics
from lmdeploy.serve.core import AsyncEngine

ANSWER = (40, 41, 42)


class ScriptedEngine:
    """What `AsyncEngine` needs of a TurboMind engine."""

    def __init__(self, engine_config: Any) -> None:
        self.engine_config = engine_config

    def create_instance(self) -> ScriptedInstance:
        return ScriptedInstance()

    async def get_health_status(self) -> dict[str, Any]:
        return {"alive": True, "message": "", "schedule_metrics": self.get_schedule_metrics()}

    def get_schedule_metrics(self) -> ScheduleMetrics:
        return ScheduleMetrics()

    def close(self) -> None: ...


class ScriptedInstance:
    """One request at a time."""

    async def async_stream_infer(
        self, session_id: int, input_ids: list[int], **given: Any
    ) -> AsyncGenerator[EngineOutput]:
        _log(input_ids=list(input_ids), multimodal=given.get("multimodal") is not None)
        for token in ANSWER:
            yield EngineOutput(ResponseType.SUCCESS, [token])
        yield EngineOutput(ResponseType.FINISH, [])

    async def async_cancel(self, session_id: int) -> None: ...

    async def async_end(self, session_id: int) -> None: ...


def _log(**record: Any) -> None:
    with Path(os.environ["SCRIPTED_LOG"]).open("a") as log:
        log.write(json.dumps(record) + "\n")


def use_scripted_engine() -> None:
    """Have every `AsyncEngine` of this process stand on a `ScriptedEngine`."""

    def build(self: Any, backend_config: Any, **_: Any) -> ScriptedEngine:
        backend_config.max_batch_size = backend_config.max_batch_size or 4
        return ScriptedEngine(backend_config)

    AsyncEngine._build_turbomind = build


if __name__ == "__main__":
    if "SCRIPTED_STOCK" not in os.environ:
        import lmdeploy_ext

        lmdeploy_ext.install()
    use_scripted_engine()
    from lmdeploy.cli import run

    run()
