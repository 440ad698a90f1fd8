"""Examples of a task: turns that show the model how to answer, with images from files beside the task.

examples:
  - user: What is the total?
    images: [receipt-1.jpg]       # before the text; files in the folder of the task file
    assistant: '{"total": 12.50, "currency": "EUR"}'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from service.types import EncodedImage, ImagePart, Message, Role, TextPart

MAX_EXAMPLES = 64
MAX_EXAMPLE_BYTES = 64 * 1024 * 1024
"""Maximum size of all example images of a task together, in bytes."""


class ExampleError(ValueError):
    """An image file of an example cannot be used; the message names the example."""


class Example(BaseModel):
    """A question, with or without images, and the answer to it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    user: str = Field("", description="text")
    images: list[str] = Field([], description="a list of names of files")
    assistant: str = Field(pattern=r"\S", description="text that is not blank")


def read_examples(
    examples: Sequence[Example], folder: Path
) -> tuple[tuple[Message, ...], tuple[EncodedImage, ...]]:
    """Two messages for each example, with empty image parts, and the images in order.

    Raises ``ExampleError`` for a file that cannot be read. Formats are checked by the server.
    """
    messages: list[Message] = []
    images: list[EncodedImage] = []
    for index, example in enumerate(examples):
        for number, name in enumerate(example.images):
            field = f"examples[{index}].images[{number}]"
            images.append(EncodedImage(field, _read(folder, name, field)))
        if sum(len(image.data) for image in images) > MAX_EXAMPLE_BYTES:
            raise ExampleError(f"examples: have more than {MAX_EXAMPLE_BYTES} bytes of images")
        question = TextPart(example.user)
        messages += [
            Message(Role.USER, (*(ImagePart() for _ in example.images), question)),
            Message(Role.ASSISTANT, (TextPart(example.assistant),)),
        ]
    return tuple(messages), tuple(images)


def _read(folder: Path, name: str, field: str) -> bytes:
    path = folder / name
    if not path.is_file():
        raise ExampleError(f"{field}: there is no file {name} beside the task")
    try:
        with path.open("rb") as file:
            return file.read(MAX_EXAMPLE_BYTES + 1)
    except OSError:
        raise ExampleError(f"{field}: the file {name} cannot be read") from None
