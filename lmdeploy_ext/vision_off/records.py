"""The records that make LMDeploy refuse images instead of dropping them while vision is
disabled."""

from __future__ import annotations

from functools import partial

from lmdeploy_ext.patch import Patch, Record, by

UPSTREAM = "LMDeploy refuses every part that is not text in language-model-only mode"
FLAG = "LMDeploy has a --disable-vision of its own"

_by = partial(by, "lmdeploy_ext.vision_off.guard")

RECORDS: tuple[Record, ...] = (
    Patch(
        name="text only: HTTP",
        target="lmdeploy.serve.openai.api_server:mount_metrics",
        signature="(app, backend_config)",
        why="The APIs drop or rewrite parts before the engine sees them. This call has the "
        "application after its routes and before authentication, which stays in front.",
        remove_when=UPSTREAM,
        replace=_by("mount_metrics"),
    ),
    Patch(
        name="text only: engine",
        target="lmdeploy.serve.core.async_engine:AsyncEngine.__init__",
        signature="(self, model_path, model_name=None, backend='turbomind', backend_config=None, "
        "chat_template_config=None, max_log_len=None, trust_remote_code=False, "
        "speculative_config=None, allowed_media_domains=None, **kwargs)",
        why="The prompt processor keeps the text parts that it knows and drops the others.",
        remove_when=UPSTREAM,
        replace=_by("engine_init"),
    ),
    Patch(
        name="text only: pipeline",
        target="lmdeploy.pipeline:Pipeline._request_generator",
        signature="(self, prompts, sessions=None, gen_config=None, **kwargs)",
        why="A pipeline hides refusals in a response with an empty text.",
        remove_when=UPSTREAM,
        replace=_by("pipeline_requests"),
    ),
    Patch(
        name="text only: TurboMind",
        target="lmdeploy.turbomind.turbomind:TurboMind.mm_input_converter",
        signature="(self, multimodal)",
        why="Images that get as far as the engine are ignored with a warning.",
        remove_when=UPSTREAM,
        replace=_by("mm_input_converter"),
    ),
    Patch(
        name="text only: --disable-vision",
        target="lmdeploy.cli.utils:ArgumentHelper.language_model_only",
        signature="(parser)",
        why="The flag under the name that says what it does.",
        remove_when=FLAG,
        replace=_by("command_line"),
    ),
    Patch(
        name="text only: disable_vision",
        target="lmdeploy.pipeline:Pipeline.__init__",
        signature="(self, model_path, backend_config=None, chat_template_config=None, "
        "log_level='WARNING', max_log_len=None, trust_remote_code=False, "
        "speculative_config=None, allowed_media_domains=None, **kwargs)",
        why="The same for pipeline(…, disable_vision=True).",
        remove_when=FLAG,
        replace=_by("pipeline_init"),
    ),
    Patch(
        name="text only: engine configuration",
        target="lmdeploy.messages:TurbomindEngineConfig.__init__",
        signature="(__dataclass_self__, *args, **kwargs)",
        why="LMDeploy silently ignores names of the configuration that it does not know.",
        remove_when=FLAG,
        replace=_by("engine_config_init"),
    ),
    Patch(
        name="text only: chat",
        target="lmdeploy.cli.chat:main",
        signature="(model_path, backend, trust_remote_code=False, **kwargs)",
        why="The parser of prompts does not know that the chat has no vision.",
        remove_when=UPSTREAM,
        replace=_by("chat"),
    ),
    Patch(
        name="text only: chat prompt",
        target="lmdeploy.cli.chat:parse_interactive_prompt",
        signature="(prompt)",
        why="An /image command is refused in one line instead of ending the chat.",
        remove_when=UPSTREAM,
        replace=_by("chat_prompt"),
    ),
)
