"""The text-only mode: with `--disable-vision` or `--language-model-only`, images, video and audio
are refused.

Stock LMDeploy does not load the vision tower in this mode, but it silently drops images and other
content parts from requests and answers without them.
"""

from __future__ import annotations

NAMES: dict[str, str | None] = {
    "lmdeploy.serve.core.exceptions:RequestError": "(code, message=None)",
    "lmdeploy.serve.core.exceptions:ErrorCode.UNSUPPORTED_FEATURE": None,
    "lmdeploy.serve.utils.server_utils:protocol_error_response": "(path, error)",
    "lmdeploy.serve.processors:MultimodalProcessor.get_prompt_input": None,
    "lmdeploy.serve.managers:SessionManager.remove": "(self, session)",
    "lmdeploy.archs:autoget_backend_config": (
        "(model_path, backend_config=None, trust_remote_code=False)"
    ),
    "lmdeploy.utils:get_model": None,
    "lmdeploy.messages:TurbomindEngineConfig.language_model_only": None,
}
"""Names of LMDeploy that this package uses, in addition to the targets of its records; see
`lmdeploy_ext.host`."""
