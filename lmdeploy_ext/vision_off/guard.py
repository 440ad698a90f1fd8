"""Replacements for functions of LMDeploy that accept only text while vision is disabled.

Each function returns the replacement for one record in `lmdeploy_ext.vision_off.records`. While
vision is enabled, every replacement behaves like the original.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

from lmdeploy_ext.vision_off.http import RefuseMedia
from lmdeploy_ext.vision_off.parts import find

REASON = "VISION_DISABLED"
SPELLINGS = ("disable_vision", "disable_vision_encoder")
"""Names of the mode; the second is that of a change that was proposed to LMDeploy."""


class VisionDisabledError(RequestError, ValueError):  # type: ignore[misc]  # LMDeploy has no types
    """A request contains something other than text while vision is disabled.

    A subclass of ``RequestError``, which every API of `lmdeploy serve` returns as HTTP 400 in its
    own format, and of ``ValueError`` for callers of `pipeline`.
    """

    def __init__(self, found: str) -> None:
        super().__init__(
            ErrorCode.UNSUPPORTED_FEATURE,
            f"{REASON}: {found}, but vision is disabled here (--disable-vision or "
            "--language-model-only) and only text is taken. Send text alone, or ask a server that "
            "has its vision tower.",
        )


def disabled(config: Any) -> bool:
    """Whether an engine configuration, of TurboMind or PyTorch, disables the vision tower."""
    return bool(getattr(config, "language_model_only", False))


def refuse(conversation: Any, where: str) -> None:
    """Raise `VisionDisabledError` unless the whole conversation is text."""
    found = find(conversation, where)
    if found is not None:
        raise VisionDisabledError(found)


def mount_metrics(original: Callable[..., None]) -> Callable[..., None]:
    """Patches the only call of `serve` with access to both the complete application and the
    configuration."""

    @functools.wraps(original)
    def replacement(app: Any, backend_config: Any) -> None:
        original(app, backend_config)
        if disabled(backend_config):
            app.add_middleware(RefuseMedia, error=VisionDisabledError)

    return replacement


def engine_init(original: Callable[..., None]) -> Callable[..., None]:
    """Patches the engine's prompt processor, which every request of every front end passes."""

    @functools.wraps(original)
    def replacement(self: Any, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **keywords)
        if not disabled(self.backend_config):
            return
        get_prompt_input = self.prompt_processor.get_prompt_input

        @functools.wraps(get_prompt_input)
        async def text_only(prompt: Any, *arguments: Any, **keywords: Any) -> Any:
            refuse(prompt, "messages")
            return await get_prompt_input(prompt, *arguments, **keywords)

        self.prompt_processor.get_prompt_input = text_only

    return replacement


def pipeline_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patches the function that all forms of a pipeline call use, in the caller's thread.

    Later errors become a `Response` with an empty text, which users may mistake for an answer.
    """

    @functools.wraps(original)
    def replacement(self: Any, prompts: Any, sessions: Any = None, **keywords: Any) -> Any:
        if disabled(self.backend_config):
            try:
                refuse(prompts, "prompts")
            except VisionDisabledError:
                _forget(self.session_mgr, sessions)
                raise
        return original(self, prompts, sessions=sessions, **keywords)

    return replacement


def _forget(manager: Any, sessions: Any) -> None:
    """Remove the sessions of a refused request, as stock LMDeploy does."""
    for session in sessions if isinstance(sessions, list) else [sessions]:
        if session is not None and session._handle is None:
            manager.remove(session)


def pipeline_init(original: Callable[..., None]) -> Callable[..., None]:
    """`pipeline(…, disable_vision=True)`, also as ``disable_vision_encoder``."""

    @functools.wraps(original)
    def replacement(
        self: Any, model_path: str, backend_config: Any = None, *arguments: Any, **keywords: Any
    ) -> None:
        if _disabled_by(keywords):
            model_path, backend_config = _without_vision(model_path, backend_config, keywords)
        original(self, model_path, backend_config, *arguments, **keywords)

    return replacement


def _disabled_by(keywords: dict[str, Any]) -> bool:
    """Take every spelling of the mode out of the keywords; whether one of them is true."""
    given = [keywords.pop(name, False) for name in SPELLINGS]
    return any(given)


def _without_vision(model_path: str, config: Any, keywords: dict[str, Any]) -> tuple[str, Any]:
    """A local model folder, and the given or automatic configuration with vision disabled."""
    from lmdeploy.archs import autoget_backend_config
    from lmdeploy.utils import get_model

    if config is None:
        if not os.path.exists(model_path):
            model_path = get_model(model_path)
        trust = keywords.get("trust_remote_code", False)
        _, config = autoget_backend_config(model_path, trust_remote_code=trust)
    config = copy.copy(config)  # do not modify the caller's object
    config.language_model_only = True
    return model_path, config


def engine_config_init(original: Callable[..., None]) -> Callable[..., None]:
    """`TurbomindEngineConfig(disable_vision=True)`, a name that stock LMDeploy silently ignores."""

    @functools.wraps(original)
    def replacement(self: Any, *arguments: Any, **keywords: Any) -> None:
        if _disabled_by(keywords):
            keywords["language_model_only"] = True
        original(self, *arguments, **keywords)

    return replacement


def mm_input_converter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patches the last step before the engine, where stock LMDeploy only warns and drops the
    images."""

    @functools.wraps(original)
    def replacement(self: Any, multimodal: Any) -> Any:
        if multimodal and disabled(self.engine_config):
            raise VisionDisabledError("the engine was given images or video")
        return original(self, multimodal)

    return replacement


def command_line(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--disable-vision`, also as `--disable-vision-encoder`, to every command with
    `--language-model-only`."""

    @functools.wraps(original)
    def replacement(parser: Any) -> Any:
        action = original(parser)
        parser.add_argument(
            *(f"--{name.replace('_', '-')}" for name in SPELLINGS),
            dest=action.dest,
            action="store_true",
            default=False,
            help="Leave the vision tower out and refuse images, video and audio, for both "
            "engines. The same as --language-model-only; added by the Qwen3-VL extension.",
        )
        return action

    return replacement


_text_chat: ContextVar[bool] = ContextVar("text_chat", default=False)


def chat(original: Callable[..., None]) -> Callable[..., None]:
    """Records for `chat_prompt` that this chat has no vision."""

    @functools.wraps(original)
    def replacement(*arguments: Any, **keywords: Any) -> None:
        token = _text_chat.set(bool(keywords.get("language_model_only")))
        try:
            original(*arguments, **keywords)
        finally:
            _text_chat.reset(token)

    return replacement


def chat_prompt(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses images in `lmdeploy chat`, which prints a ``ValueError`` of its prompt parser and
    continues."""

    @functools.wraps(original)
    def replacement(prompt: str) -> Any:
        content = original(prompt)
        if _text_chat.get():
            refuse(content, "the prompt")
        return content

    return replacement
