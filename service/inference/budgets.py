"""What all calls of a process share, whichever engine and front end they take: slots, memory, quotas."""

from __future__ import annotations

from service.inference.admission import Admission
from service.inference.decoding import ImageDecoder
from service.inference.images import ImageLimits
from service.inference.memory import MemoryBudget
from service.quotas import Quotas
from service.settings import Settings

MAX_VALIDATIONS = 8
"""Grammars that are validated at the same time; they take processors, not places in the engine."""
LARGE_DIVISOR = 4
"""The part of the slots that calls with large images get at most."""


class Budgets:
    """The limits of the settings, as places and bytes to hold. Lives on one event loop."""

    def __init__(self, settings: Settings) -> None:
        slots, queue = settings.max_concurrent, settings.max_queue
        self.quotas = Quotas()
        self.decoder = ImageDecoder(image_limits(settings), settings.max_decoding_bytes)
        self.encoded = MemoryBudget(
            settings.max_encoded_bytes, max_waiting=settings.max_encoded_bytes
        )
        self.admission = Admission(slots, queue)
        # Calls with large images spend seconds with decoding them: most slots are for the others.
        self.large = Admission(max(1, slots // LARGE_DIVISOR), queue)
        # A grammar that takes long holds no place that others could use; calls that hold their
        # images meanwhile are as many as may wait.
        self.analyses = Admission(slots + queue, 0)
        self.validations = Admission(MAX_VALIDATIONS, queue)
        self.waiting = Waiting()

    @property
    def memory(self) -> dict[str, tuple[int, int]]:
        """Name of a budget -> bytes in use, and the limit."""
        budgets = {"encoded": self.encoded, "decoding": self.decoder.memory}
        return {name: (budget.held, budget.limit) for name, budget in budgets.items()}


class Waiting:
    """Counts the calls that wait for memory or a slot: those in the body of ``with``."""

    def __init__(self) -> None:
        self.calls = 0

    def __enter__(self) -> None:
        self.calls += 1

    def __exit__(self, *_: object) -> None:
        self.calls -= 1


def image_limits(settings: Settings) -> ImageLimits:
    """Bounds of the images of a caller and of the operator alike."""
    return ImageLimits(
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        max_request_pixels=settings.max_request_pixels,
        formats=settings.accepted_formats,
        background=settings.background_rgb,
        jpeg_scaled_pixels=settings.jpeg_scaled_pixels,
    )
