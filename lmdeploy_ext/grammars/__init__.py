"""Grammars in plain LMDeploy are enforced, or refused with the reason.

Stock LMDeploy compiles the grammar of a request on its event loop. A grammar that takes minutes
stops the server, one that crashes the compiler ends it, one that only TurboMind's compiler refuses
becomes HTTP 500 or a broken stream, and parts that the compiler ignores are not enforced. While the
promise is on, a process that can be killed tries out each grammar first (`worker`, `trials`), and
the engine compiles it in a thread before the request starts (`guard`).
"""

from __future__ import annotations

VARIABLE = "LMDEPLOY_QWEN3VL_GRAMMARS"

NAMES: dict[str, str | None] = {
    "lmdeploy._guided_decoding:_grammar_source": "(response_format)",
    "lmdeploy._guided_decoding:compile_response_format": "(compiler, response_format)",
    "lmdeploy.serve.core.exceptions:RequestError": "(code, message=None)",
    "lmdeploy.serve.core.exceptions:ErrorCode.ENGINE_UNAVAILABLE": None,
    "lmdeploy.serve.core.exceptions:ErrorCode.INVALID_REQUEST": None,
    "lmdeploy.serve.managers:Session": None,
    "lmdeploy.serve.managers:SessionManager.remove": "(self, session)",
    "lmdeploy.turbomind.turbomind:TurboMind.grammar_compiler": None,
}
"""Names of LMDeploy that this package uses, in addition to the targets of its records; see
`lmdeploy_ext.host`."""
