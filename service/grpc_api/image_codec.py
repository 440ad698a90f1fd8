"""Converts images from proto messages to plain values. Checks their number and bounds, not their
bytes."""

from __future__ import annotations

from collections.abc import Sequence

from service.errors import InvalidRequest, TooManyImages
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.types import EncodedImage


def decode_images(images: Sequence[pb.Image], most: int) -> tuple[EncodedImage, ...]:
    """Images -> EncodedImages. Checks their number and bounds, not their bytes."""
    if len(images) > most:
        raise TooManyImages(len(images), most)
    return tuple(decode_image(image, f"images[{index}]") for index, image in enumerate(images))


def decode_image(image: pb.Image, path: str) -> EncodedImage:
    """Image -> EncodedImage."""
    data = image.data  # read once, because every access copies the bytes
    if not data:
        raise InvalidRequest(f"{path}.data", "has no bytes", reason="IMAGE_EMPTY")
    least = image.min_pixels if image.HasField("min_pixels") else None
    most = image.max_pixels if image.HasField("max_pixels") else None
    if least == 0:
        raise InvalidRequest(f"{path}.min_pixels", "must be at least 1")
    if most == 0:
        raise InvalidRequest(f"{path}.max_pixels", "must be at least 1")
    if least is not None and most is not None and least > most:
        raise InvalidRequest(f"{path}.min_pixels", f"{least} is more than max_pixels {most}")
    return EncodedImage(f"{path}.data", data, least, most)
