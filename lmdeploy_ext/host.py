"""The supported versions of LMDeploy, and every name of LMDeploy that the extension uses.

`NAMES` lists the names that the extension imports, overrides or replaces. If the installed LMDeploy
lacks a name, `lmdeploy_ext.install` raises one error before it changes anything.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from lmdeploy_ext import deepstack, vision_off
from lmdeploy_ext.families import QWEN3_VL
from lmdeploy_ext.patch import ExtensionError, HostDrift, drift
from lmdeploy_ext.promise import Promise
from lmdeploy_ext.promises import PROMISES

FIRST, BEFORE = (0, 18, 0), (0, 19)
"""Verified releases: FIRST <= release < BEFORE."""

ARCHITECTURES = QWEN3_VL.architectures
"""The architectures that the extension adds to TurboMind."""

REMEDY = (
    "Install a verified release (pip install 'lmdeploy>=0.18.0,<0.19'), use a newer release of "
    "this package, or run LMDeploy without the extension: it then serves Qwen3-VL with its "
    "PyTorch engine (--backend pytorch)."
)

SUPPORTED_ARCHS = "lmdeploy.turbomind.supported_models:SUPPORTED_ARCHS"
INPUT_MODELS = "lmdeploy.turbomind.models.base:INPUT_MODELS"
NATIVE_VISION = "lmdeploy.vl.model.qwen3:Qwen3VLModel._turbomind_native_vision"

_BUILDERS = "lmdeploy.turbomind.builders"
_QWEN3 = "lmdeploy.turbomind.models.qwen3:Qwen3TextModel"
_VIT = "lmdeploy.turbomind.models.qwen3_5:Qwen3_5VisionModel"
_TEXT = "lmdeploy.turbomind.text_model:TextModel"

_OWN_NAMES: dict[str, str | None] = {
    # registration
    SUPPORTED_ARCHS: None,
    INPUT_MODELS: None,
    NATIVE_VISION: None,
    "lmdeploy.turbomind.converter:get_tm_config": (
        "(model_path, engine_config, group_size=None, trust_remote_code=False)"
    ),
    # the decoder is a subclass of Qwen3's
    _QWEN3: "(cfg, *, resolver)",
    f"{_QWEN3}.layers": "(self, pfx)",
    f"{_QWEN3}.moe": "(self, pfx)",
    f"{_QWEN3}.ffn": "(self, pfx, is_expert=False, *, tp)",
    f"{_TEXT}.model": "(self, pfx)",
    f"{_TEXT}.norm": "(self, pfx, transform=None, *, zero_centered=False)",
    f"{_TEXT}._linear": "(self, pfx, *, optional=False)",
    f"{_TEXT}.bind_runtime": (
        "(self, *, ctx, root_handles, attn_tp, mlp_tp, ep, model_tp, dense_tp)"
    ),
    "lmdeploy.turbomind.models.utils:make_model_weight_config": "(cfg)",
    f"{_BUILDERS}:TextModelBuilder": "(config, ctx, *, root_handles, tp, vocab_size)",
    f"{_BUILDERS}:TextModelBuilder.add_token_embeds": "(self, tensor)",
    f"{_BUILDERS}:TextModelBuilder.add_lm_head": "(self, linear)",
    f"{_BUILDERS}:FfnBuilder": "(config, ctx, tp)",
    f"{_BUILDERS}:FfnBuilder.add_ffn": "(self, w1, w2, w3)",
    f"{_BUILDERS}.linear:Linear": "(tensors, weight_format)",
    f"{_BUILDERS}.linear:_build_linear": "(fmt, available)",
    "lmdeploy.turbomind.weight_format:WeightFormatResolver.resolve": (
        "(self, pfx, *, index=None, optional=False)"
    ),
    "lmdeploy.turbomind.checkpoint:Prefix": "(ckpt, prefix='')",
    "lmdeploy.turbomind.checkpoint:Prefix.get": "(self, name='', sep='.', *, index=None)",
    "lmdeploy.turbomind.checkpoint:Prefix.pop": "(self, name='', sep='.', *, index=None)",
    "lmdeploy.turbomind.checkpoint:Prefix.has": "(self, name='', sep='.')",
    "lmdeploy.turbomind.checkpoint:Checkpoint.keys": "(self)",
    # the vision tower is a subclass of Qwen3.5's
    _VIT: "(vision_cfg, *, resolver)",
    f"{_VIT}.model": "(self, pfx)",
    f"{_VIT}.to_turbomind_multimodal": "(self, multimodal)",
    "lmdeploy.turbomind.vision_model:VisionModel.bind_runtime": (
        "(self, *, ctx, root_handles, model_tp)"
    ),
    f"{_VIT}._offset_pair": "(offset)",
    f"{_VIT}._grid_thw": "(grid_thw)",
    "lmdeploy.turbomind.models.qwen3_5:_VIT_HEAD_DIM_PADDED": None,
    f"{_BUILDERS}:Context": "(devices, gemm, data_type, gemm_input_dtype)",
    "lmdeploy.vl.constants:Modality": None,
    **deepstack.NAMES,
    **vision_off.NAMES,
}

NAMES: dict[str, str | None] = {
    **_OWN_NAMES,
    **{name: signature for one in PROMISES for name, signature in one.names.items()},
}
"""``module:attribute`` -> its parameters as in `lmdeploy_ext.patch.Patch`; None if only the name
matters. Methods are listed at the class that defines them. Targets of records are not listed."""


class HostUnavailable(ExtensionError):
    """LMDeploy is not installed, or its TurboMind module cannot be loaded on this machine."""


def installed_version() -> str:
    """The release of the installed LMDeploy, from its package metadata.

    Raises:
        HostUnavailable: LMDeploy is not installed.
    """
    try:
        return version("lmdeploy")
    except PackageNotFoundError:
        raise HostUnavailable(
            "LMDeploy is not installed: pip install 'lmdeploy>=0.18.0,<0.19'"
        ) from None


def check_release() -> str:
    """The release of the installed LMDeploy, if it is a verified one.

    Raises:
        HostUnavailable: LMDeploy is not installed.
        HostDrift: another release.
    """
    found = installed_version()
    if not FIRST <= _release(found) < BEFORE:
        raise HostDrift([f"LMDeploy {found} is not verified"], REMEDY)
    return found


def check() -> None:
    """Refuse an LMDeploy that the extension does not support. Imports LMDeploy, changes nothing.

    Raises:
        HostUnavailable: LMDeploy is missing, or its native module does not load.
        HostDrift: another release, or a release that supports Qwen3-VL on TurboMind itself.
    """
    found = check_release()
    _check_native_module()
    if drift(SUPPORTED_ARCHS):
        return  # reported by `problems`
    module, _, attribute = SUPPORTED_ARCHS.partition(":")
    supported = getattr(importlib.import_module(module), attribute)
    present = [name for name in ARCHITECTURES if name in supported]
    if present:
        raise HostDrift(
            [f"LMDeploy {found} itself supports {', '.join(present)} on TurboMind"],
            "The extension is no longer needed: use this LMDeploy without it, or the extension "
            "with lmdeploy>=0.18.0,<0.19.",
        )


def problems(promises: Sequence[Promise] = PROMISES) -> list[str]:
    """The differences of the installed LMDeploy, one sentence for each of `NAMES`, without those
    of other promises.

    A missing class is reported once, not again for each of its methods.
    """
    left_out = {name for one in PROMISES if one not in promises for name in one.names}
    left_out -= {*_OWN_NAMES, *(name for one in promises for name in one.names)}
    return _problems({name: NAMES[name] for name in NAMES if name not in left_out})


def remedy(promises: Sequence[Promise]) -> str:
    """The advice for an LMDeploy that differs, also how to run without a promise that it breaks."""
    ways = [
        one.way_out
        for one in promises
        if _problems(one.names) or any(record.problem() for record in one.records)
    ]
    return " ".join([REMEDY, *ways])


def _problems(names: Mapping[str, str | None]) -> list[str]:
    found: dict[str, str] = {}
    for name, signature in names.items():
        if not any(name.startswith(f"{gone}.") for gone in found):
            problem = drift(name, signature, own=True)
            if problem is not None:
                found[name] = problem
    return list(found.values())


def _check_native_module() -> None:
    try:
        turbomind = importlib.import_module("lmdeploy.turbomind")
    except ImportError as error:
        raise HostUnavailable(f"LMDeploy cannot be imported: {error}") from error
    if turbomind.is_available():
        return
    cause = turbomind._import_error
    advice = "Reinstall LMDeploy with its CUDA libraries."
    if "libcuda.so.1" in str(cause):
        advice = (
            "libcuda.so.1 belongs to the NVIDIA driver: run on a machine with a GPU and its driver "
            "(in Docker with --gpus all)."
        )
    raise HostUnavailable(f"LMDeploy's TurboMind module cannot be loaded: {cause}. {advice}")


def _release(text: str) -> tuple[int, ...]:
    """``"0.18.1rc1+cu12"`` -> ``(0, 18, 1)``."""
    numbers = []
    for part in text.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
