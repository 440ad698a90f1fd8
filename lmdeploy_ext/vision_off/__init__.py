"""Text only: with `--disable-vision` or `--language-model-only`, images, video and audio are refused.

Stock LMDeploy leaves the vision tower out in this mode, but drops content parts that it does not
know, and some that it does, and answers as if they had not been sent.
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
"""What this package uses of LMDeploy beside the targets of its records; see `lmdeploy_ext.host`."""
