"""The records that make LMDeploy read images with `lmdeploy_ext.images`, or refuse video."""

from __future__ import annotations

from functools import partial

from lmdeploy_ext.media import IMAGE_NAMES, IMAGES_VARIABLE, VIDEO_NAMES, VIDEO_VARIABLE
from lmdeploy_ext.patch import Patch, by
from lmdeploy_ext.promise import Promise

READING = "LMDeploy turns images upright, scales 16 bits, and refuses truncated and huge files"

_by = partial(by, "lmdeploy_ext.media.guard")

IMAGES = Promise(
    variable=IMAGES_VARIABLE,
    on="images are checked and read upright",
    off="images are read as by stock LMDeploy",
    names=IMAGE_NAMES,
    records=(
        Patch(
            name="images: bytes",
            target="lmdeploy.vl.media.image:ImageMediaIO.load_bytes",
            signature="(self, data)",
            own=True,
            why="Pillow decodes any file of any size, and nobody applies its orientation or scales "
            "its 16 bits.",
            remove_when=READING,
            replace=_by("load_bytes"),
        ),
        Patch(
            name="images: files",
            target="lmdeploy.vl.media.image:ImageMediaIO.load_file",
            signature="(self, file_path)",
            own=True,
            why="The same for local files.",
            remove_when=READING,
            replace=_by("load_file"),
        ),
        Patch(
            name="images: truncated files",
            target="PIL.ImageFile:LOAD_TRUNCATED_IMAGES",
            why="LMDeploy has Pillow fill the missing part of a file with grey, for the whole "
            "process.",
            remove_when=READING,
            replace=lambda original: False,
        ),
        Patch(
            name="images: places",
            target="lmdeploy.serve.processors.multimodal:MultimodalProcessor._parse_multimodal_item",
            signature="(i, in_messages, out_messages, media_io_kwargs, allowed_media_domains=None)",
            why="An error does not say which image of the conversation it is about, and images "
            "that a program opened with Pillow are not turned upright.",
            remove_when="LMDeploy's errors name the image by its place",
            replace=_by("parse"),
        ),
        Patch(
            name="images: chat",
            target="lmdeploy.cli.chat:parse_interactive_prompt",
            signature="(prompt)",
            why="A chat prints nothing when an image cannot be read, and keeps the empty answer.",
            remove_when="lmdeploy chat prints the error of a response",
            replace=_by("chat_prompt"),
        ),
    ),
)

VIDEO = Promise(
    variable=VIDEO_VARIABLE,
    on="video is decoded by stock LMDeploy",
    off="video is refused",
    applied_when=False,
    names=VIDEO_NAMES,
    records=(
        Patch(
            name="video: refused",
            target="lmdeploy.vl.media.video:VideoMediaIO.__init__",
            signature="(self, image_io, num_frames=32, **kwargs)",
            why="LMDeploy decodes video in its own process, without a limit of pixels, and with an "
            "FFmpeg that has a known defect (CVE-2026-8461).",
            remove_when="LMDeploy has an option that refuses video",
            replace=_by("refuse_video"),
        ),
    ),
)
