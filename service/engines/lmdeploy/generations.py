"""The generations of NVIDIA GPUs as data: the types in which LMDeploy's TurboMind computes on each.

Does not import LMDeploy. A test asks the installed LMDeploy the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from service.errors import EngineUnavailable

logger = logging.getLogger(__name__)

Capability = tuple[int, int]
"""Compute capability of a GPU, such as (8, 9)."""
FP16, BF16 = ("float16",), ("bfloat16",)
BOTH = ("bfloat16", "float16")
PLAIN, FOUR_BIT, FP8 = "16 bits", "4 bits", "FP8"
FORMATS: Mapping[str, str] = {
    "hf": PLAIN, "awq": FOUR_BIT, "gptq": FOUR_BIT, "compressed-tensors": FOUR_BIT, "fp8": FP8
}  # fmt: skip
"""Value of the setting ``model_format``, or of ``quant_method`` in config.json -> kind of weights."""


@dataclass(frozen=True, slots=True)
class Generation:
    """GPUs with the same types.

    Attributes:
        name: of the generation.
        gpus: examples.
        capabilities: every compute capability of the generation.
        dtypes: kind of weights -> types of the computation, the preferred one first.
    """

    name: str
    gpus: str
    capabilities: tuple[Capability, ...]
    dtypes: Mapping[str, tuple[str, ...]]


_OLD = {PLAIN: FP16, FOUR_BIT: FP16, FP8: FP16}
_NEW = {PLAIN: BOTH, FOUR_BIT: FP16, FP8: BF16}
GENERATIONS = (
    Generation("Volta", "V100", ((7, 0),), _OLD),
    Generation("Turing", "T4, RTX 20", ((7, 5),), _OLD),
    Generation("Ampere", "A100 (8.0); A10, RTX 30 (8.6)", ((8, 0), (8, 6)), _NEW),
    Generation("Ada", "L4, L40, RTX 40", ((8, 9),), _NEW),
    Generation("Hopper", "H100, H200", ((9, 0),), {PLAIN: BOTH, FOUR_BIT: BOTH, FP8: BF16}),
    Generation("Blackwell", "B200 (10.0); RTX 50 (12.0)", ((10, 0), (12, 0)), _NEW),
)


def choose_dtype(
    asked: str, checkpoint: str, model_format: str, gpu: str, capability: Capability
) -> str:
    """The type in which TurboMind computes on a GPU.

    Args:
        asked: the setting ``dtype``; "auto" takes the type of the checkpoint if the GPU has it.
        checkpoint: type of the weights.
        model_format: a key of `FORMATS`.
        gpu: name of the GPU, for errors.

    Returns:
        A type; ``asked`` for a GPU or a format that the table does not have.

    Raises:
        EngineUnavailable: TurboMind does not run on the GPU, or would silently take another type
            than the setting says.
    """
    oldest = GENERATIONS[0].capabilities[0]
    shown = f"{gpu} (compute capability {version(capability)})"
    if capability < oldest:
        raise EngineUnavailable(
            f"TurboMind does not run on {shown}: it needs {version(oldest)} ({GENERATIONS[0].gpus}) "
            "or newer; take engine=reference"
        )
    kind = FORMATS.get(model_format)
    found = next((one for one in GENERATIONS if capability in one.capabilities), None)
    if found is None or kind is None:
        return asked
    dtypes = found.dtypes[kind]
    if asked in dtypes:
        return asked
    if asked != "auto":
        raise EngineUnavailable(
            f"dtype {asked} with weights in {kind}: on {shown} TurboMind computes in "
            f"{' or '.join(dtypes)}; leave dtype at auto"
        )
    chosen = checkpoint if checkpoint in dtypes else dtypes[0]
    if chosen != checkpoint:
        logger.warning(
            "the checkpoint is in %s, but on %s TurboMind computes weights in %s in %s",
            checkpoint, shown, kind, chosen,
        )  # fmt: skip
    return chosen


def version(capability: Capability) -> str:
    """A compute capability as NVIDIA writes it, such as "8.9"."""
    return "{}.{}".format(*capability)
