"""Converts the images of a packed request to the input of LMDeploy's engines: pixels, never a URL
or path."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from lmdeploy.vl.constants import Modality

from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig, normalise
from lmdeploy_ext.packing import PackedImage, PackedRequest


def multimodal_items(
    prompt: PackedRequest, config: ImageProcessorConfig, image_token_id: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One item for each image, in the order of the prompt.

    ``pixel_values``: (h*w, 3*2*p*p) in ``dtype``, normalised as transformers does; ``offset``: the
    half-open span of its tokens; ``image_grid_thw``: int64 (3,), in patches.
    """
    return [
        {
            "modality": Modality.IMAGE,
            "pixel_values": torch.from_numpy(normalise(image.patches, config)).to(dtype),
            "image_grid_thw": torch.tensor(image.grid, dtype=torch.int64),
            "offset": span,
            "image_token_id": image_token_id,
            "fingerprint": fingerprint(image),
        }
        for image, span in zip(prompt.images, prompt.spans, strict=True)
    ]


def fingerprint(image: PackedImage) -> bytes:
    """A hash of 32 bytes that identifies an image in the prefix cache.

    Computed from the uint8 patches, which have the same information as the pixels. LMDeploy would
    hash the larger float pixels on the event loop.
    """
    digest = hashlib.sha256(repr((image.grid, image.patches.shape)).encode())
    digest.update(np.ascontiguousarray(image.patches).data)
    return digest.digest()
