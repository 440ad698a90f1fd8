"""Starts and stops DeepStack for a model that TurboMind loads: loads its weights and registers its
listener."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from lmdeploy.turbomind.builders._base import _CPP_TO_TORCH
from torch import Tensor

from lmdeploy_ext.deepstack import selftest
from lmdeploy_ext.deepstack.binding import hook
from lmdeploy_ext.deepstack.features import Features
from lmdeploy_ext.deepstack.mergers import NAMES, Merger
from lmdeploy_ext.deepstack.modes import VARIABLE, DeepStackUnavailable
from lmdeploy_ext.deepstack.state import STATE, Mode, running, status

logger = logging.getLogger("lmdeploy_ext")


def start(
    owner: Any,
    tower: Any,
    *,
    vision: Any,
    text: Any,
    dtype: torch.dtype,
    groups: Mapping[str, int],
) -> None:
    """Load the mergers and register a listener for the engine that is being built, unless DeepStack
    is off.

    Args:
        owner: an object that lives as long as the engine. Only one model at a time can have
        DeepStack. tower: LMDeploy's ``Prefix`` of the vision tower in the checkpoint. vision, text:
        transformers' configurations. dtype: dtype in which the vision tower computes.
        groups: number of GPUs of each kind of parallelism.

    Raises:
        DeepStackUnavailable: the model uses several GPUs, another model with DeepStack runs in this
        process, or the self-test failed.
        KeyError, ValueError: tensors are missing or have wrong shapes.
    """
    taps = list(vision.deepstack_visual_indexes)[: text.num_hidden_layers]
    if not taps:
        return
    _check_alone(groups)
    selftest.verify()
    if not status().active:
        _warn(len(list(vision.deepstack_visual_indexes)))
        return
    merge = vision.spatial_merge_size
    if merge != 2:
        raise ValueError(f"spatial_merge_size is {merge}, DeepStack is written for 2")

    def merger(number: int) -> Merger:
        def load(name: str) -> Tensor:
            tensor: Tensor = tower.get(f"deepstack_merger_list.{number}.{name}").to(dtype)
            return tensor

        return Merger(load, vision.hidden_size * merge**2, text.hidden_size)

    mergers = [merger(number) for number in range(len(taps))]
    device = tower.get(f"deepstack_merger_list.0.{NAMES[0]}").device
    dtypes = {int(number): kind for number, kind in _CPP_TO_TORCH.items()}
    features = Features(mergers, taps, text.hidden_size, dtype, device, dtypes)
    _listen(owner, features, taps)
    logging.getLogger("lmdeploy").info(
        "DeepStack is on: vision blocks %s feed decoder layers 0 to %d", taps, len(taps) - 1
    )


def stop(owner: Any) -> None:
    """Called when the engine of ``owner`` is closed. Does nothing for other engines."""
    if STATE.owner is not None and STATE.owner() is owner:
        _forget()


def _listen(owner: Any, features: Features, taps: list[int]) -> None:
    STATE.features = features
    # An engine may be garbage-collected without being closed.
    STATE.owner = weakref.ref(owner, lambda one: _forget() if STATE.owner is one else None)
    hook().listen(features.tell, taps, len(taps))


def _forget() -> None:
    hook().silence()
    STATE.owner = STATE.features = None


def _check_alone(groups: Mapping[str, int]) -> None:
    if not status().active:
        return
    spread = {name: size for name, size in groups.items() if size > 1}
    if spread:
        raise DeepStackUnavailable(
            f"DeepStack on TurboMind works on one GPU; this engine has {spread}. Use LMDeploy's "
            f"PyTorch engine (--backend pytorch), or {VARIABLE}=off for TurboMind without DeepStack."
        )
    if running():
        gc.collect()  # a dropped engine may only wait for garbage collection
    if running():
        raise DeepStackUnavailable(
            "another engine with DeepStack runs in this process: close it first (TurboMind.close), "
            "or use a process of its own for each"
        )


def _warn(count: int) -> None:
    found = status()
    if found.mode in (Mode.OFF, None):
        logger.warning(
            "%d DeepStack mergers are left out: %s. Expect worse reading and locating than from the "
            "PyTorch engine.",
            count,
            found.reason,
        )
    else:
        raise DeepStackUnavailable(
            f"this model has {count} DeepStack mergers, and TurboMind cannot be given DeepStack: "
            f"{found.reason}. Use LMDeploy's PyTorch engine (--backend pytorch), or {VARIABLE}=off."
        )
