"""The error for an image that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping


class ImageRefused(ValueError):
    """An image file, or several together, cannot be used.

    Attributes:
        field: the image in the request, as in ``images[2].data``.
        description: the problem, and what to do about it; begins with a verb.
        reason: one of the reasons ``IMAGE_…`` of docs/errors.md.
        metadata: details for programs, such as the limit and the actual value.
    """

    def __init__(
        self,
        field: str,
        description: str,
        *,
        reason: str = "IMAGE_INVALID",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description
        self.reason = reason
        self.metadata = dict(metadata or {})
