"""What all calls of a process share, whichever engine and front end they take: slots, memory, quotas."""

from __future__ import annotations

from lmdeploy_ext.images.files import ImageLimits
from service.inference.admission import Admission
from service.inference.decoding import ImageDecoder
from service.inference.memory import MemoryBudget
from service.quotas import Quotas
from service.settings import Settings

MAX_VALIDATIONS = 8
"""Maximum number of grammars that are validated at the same time. They need processors, not
inference slots."""
LARGE_DIVISOR = 4
"""Maximum fraction of the slots for calls with large images."""


class Budgets:
    """The limits of the settings as slots and memory budgets. Not thread-safe: belongs to one event
    loop."""

    def __init__(self, settings: Settings) -> None:
        slots, queue = settings.slots, settings.max_queue
        self.quotas = Quotas()
        self.decoder = ImageDecoder(image_limits(settings), settings.max_decoding_bytes)
        self.encoded = MemoryBudget(
            settings.max_encoded_bytes, max_waiting=settings.max_encoded_bytes
        )
        self.admission = Admission(slots, queue)
        # Calls with large images spend seconds on decoding, so most slots are for other calls.
        self.large = Admission(max(1, slots // LARGE_DIVISOR), queue)
        # A slow grammar occupies no inference slot. The number of calls that hold images meanwhile
        # is limited by the queue.
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
    """Limits of images, for callers and for task files alike."""
    return ImageLimits(
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        max_request_pixels=settings.max_request_pixels,
        formats=settings.accepted_formats,
        background=settings.background_rgb,
        jpeg_scaled_pixels=settings.jpeg_scaled_pixels,
    )
