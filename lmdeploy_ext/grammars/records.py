"""The records that make LMDeploy refuse a grammar instead of going on without it."""

from __future__ import annotations

from functools import partial

from lmdeploy_ext.grammars import NAMES, VARIABLE
from lmdeploy_ext.patch import Patch, by
from lmdeploy_ext.promise import Promise

UPSTREAM = "LMDeploy compiles grammars outside its event loop and refuses what it cannot enforce"

_by = partial(by, "lmdeploy_ext.grammars.guard")

GRAMMARS = Promise(
    variable=VARIABLE,
    on="grammars are enforced or refused",
    off="grammars are handled by stock LMDeploy",
    names=NAMES,
    records=(
        Patch(
            name="grammars: requests",
            target="lmdeploy.serve.core.async_engine:AsyncEngine.preprocess",
            signature="(self, messages, session_id, gen_config=None, tools=None, "
            "reasoning_effort=None, do_preprocess=True, adapter_name=None, input_ids=None, "
            "enable_thinking=None, chat_template_kwargs=None, media_io_kwargs=None, "
            "mm_processor_kwargs=None, **kwargs)",
            why="Every front end passes here before its answer begins, so that a refusal is HTTP "
            "400, also for a stream.",
            remove_when=UPSTREAM,
            replace=_by("preprocess"),
        ),
        Patch(
            name="grammars: event loop",
            target="lmdeploy.serve.core.async_engine:ensure_response_format_compilable",
            signature="(response_format)",
            why="LMDeploy converts the grammar on its event loop, which a large one stops.",
            remove_when=UPSTREAM,
            replace=_by("ensure_compilable"),
        ),
        Patch(
            name="grammars: TurboMind",
            target="lmdeploy.turbomind.turbomind:compile_response_format",
            signature="(compiler, response_format)",
            why="After some errors LMDeploy logs a warning and generates without the grammar.",
            remove_when=UPSTREAM,
            replace=_by("compile_for_turbomind"),
        ),
        Patch(
            name="grammars: pipeline",
            target="lmdeploy.pipeline:Pipeline._request_generator",
            signature="(self, prompts, sessions=None, gen_config=None, **kwargs)",
            why="A pipeline hides refusals in a response with an empty text.",
            remove_when=UPSTREAM,
            replace=_by("pipeline_requests"),
        ),
    ),
)
