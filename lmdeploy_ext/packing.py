"""The packed request: the input data structure of every engine.

It contains token ids with expanded image placeholders, the span of each image, the pixels as uint8
patches, and the mRoPE positions. Everything is plain numpy, so a process without torch can build a
packed request.

Letters: T tokens, h and w the image's sides in patches, C channels, p pixels per patch side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmdeploy_ext.mrope import mrope_positions


@dataclass(frozen=True, slots=True, eq=False)
class PackedImage:
    """One still image or one pair of video frames, cut into patches.

    Attributes:
        patches: uint8 (h*w, C*p*p) for a still image or (h*w, C*2*p*p) for a frame pair. The values
            of a patch have the order channel, frame, row, column. The patches have the order block
            row, block column, row in block, column in block, so that the patches of one token are
            adjacent.
        grid: (1, h, w) in patches.
        merge_size: patches per side that are merged into one token.
    """

    patches: npt.NDArray[np.uint8]
    grid: tuple[int, int, int]
    merge_size: int = 2

    def __post_init__(self) -> None:
        t, h, w = self.grid
        if t != 1 or h < 1 or w < 1 or h % self.merge_size or w % self.merge_size:
            raise ValueError(
                f"grid {self.grid} must be (1, h, w) with sides in multiples of {self.merge_size}"
            )
        if self.patches.dtype != np.uint8:
            raise ValueError(f"patches must be uint8, got {self.patches.dtype}")
        if self.patches.ndim != 2 or self.patches.shape[0] != h * w:
            raise ValueError(f"patches {self.patches.shape} do not fit grid {self.grid}")

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the image in the prompt, after merging."""
        return len(self.patches) // self.merge_size**2


@dataclass(frozen=True, slots=True, eq=False)
class PackedRequest:
    """A prompt ready for prefill.

    Attributes:
        token_ids: int32 (T,), one image-pad id per merged image token.
        spans: for each image, the half-open range ``[begin, end)`` of its tokens.
        images: the images, in the order of the spans.
        position_ids: int32 (3, T), see `lmdeploy_ext.mrope.mrope_positions`.
        position_delta: position of a generated token minus its index in the sequence.
    """

    token_ids: npt.NDArray[np.int32]
    spans: tuple[tuple[int, int], ...]
    images: tuple[PackedImage, ...]
    position_ids: npt.NDArray[np.int32]
    position_delta: int


def pack(
    segments: Sequence[Sequence[int] | npt.NDArray[np.integer] | PackedImage],
    image_token_id: int,
    merge_size: int = 2,
) -> PackedRequest:
    """Join text token ids and images, in prompt order, into one request.

    Each image is replaced by ``num_tokens`` times ``image_token_id``. The vision-start and
    vision-end ids around an image belong to the text segments.

    Raises:
        ValueError: a text segment contains ``image_token_id`` (a forged placeholder) or is not a
        flat sequence of non-negative int32 ids, or an image has another merge size.
    """
    runs: list[npt.NDArray[np.int32]] = []
    spans: list[tuple[int, int]] = []
    images: list[PackedImage] = []
    length = 0
    for index, segment in enumerate(segments):
        if isinstance(segment, PackedImage):
            if segment.merge_size != merge_size:
                raise ValueError(
                    f"segment {index}: image has merge size {segment.merge_size}, not {merge_size}"
                )
            run = np.full(segment.num_tokens, image_token_id, dtype=np.int32)
            spans.append((length, length + len(run)))
            images.append(segment)
        else:
            run = _text_run(index, segment, image_token_id)
        runs.append(run)
        length += len(run)
    token_ids = np.concatenate(runs) if runs else np.empty(0, dtype=np.int32)
    positions, delta = mrope_positions(length, spans, [image.grid for image in images], merge_size)
    return PackedRequest(token_ids, tuple(spans), tuple(images), positions, delta)


def _text_run(
    index: int, segment: Sequence[int] | npt.NDArray[np.integer], image_token_id: int
) -> npt.NDArray[np.int32]:
    ids = np.asarray(segment)
    if ids.size == 0:
        return np.empty(0, dtype=np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"segment {index}: need a flat run of integers, got {ids.dtype} {ids.shape}"
        )
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise ValueError(f"segment {index}: token ids must be between 0 and 2**31 - 1")
    if (ids == image_token_id).any():
        raise ValueError(
            f"segment {index}: text contains the image placeholder id {image_token_id}; "
            "only an image may create it"
        )
    return ids.astype(np.int32)
