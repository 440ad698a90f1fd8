"""Images in plain LMDeploy are read as people see them, or refused; video can be refused.

Stock LMDeploy ignores the orientation of photos, turns 16-bit images white, decodes truncated files
as far as they go, and decodes any file before it knows its size. While the promise is on, it reads
images with `lmdeploy_ext.images`.
"""

from __future__ import annotations

IMAGES_VARIABLE = "LMDEPLOY_QWEN3VL_IMAGES"
VIDEO_VARIABLE = "LMDEPLOY_QWEN3VL_VIDEO"

IMAGE_NAMES: dict[str, str | None] = {
    "lmdeploy.serve.core.exceptions:RequestError": "(code, message=None)",
    "lmdeploy.serve.core.exceptions:ErrorCode.ENGINE_UNAVAILABLE": None,
    "lmdeploy.vl.media.connection:load_from_url": "(url, media_io, allowed_media_domains=None)",
}
VIDEO_NAMES: dict[str, str | None] = {
    "lmdeploy.serve.core.exceptions:RequestError": "(code, message=None)",
    "lmdeploy.serve.core.exceptions:ErrorCode.UNSUPPORTED_FEATURE": None,
}
"""Names of LMDeploy that this package uses, in addition to the targets of its records; see
`lmdeploy_ext.host`."""
