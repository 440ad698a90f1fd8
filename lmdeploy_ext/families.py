"""Model families as data: the differences between the models that this project supports.

A family is one record in `FAMILIES`. Code reads the record instead of comparing names of
architectures, so that for the reference engine a new family needs only a record. TurboMind also
needs a source model, see docs/extending.md. Imports no heavy packages.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """Models with the same computation.

    Attributes:
        name: display name, such as "Qwen3-VL".
        dense: values of ``architectures`` in config.json of checkpoints without experts.
        moe: values of ``architectures`` for checkpoints with a mixture of experts.
        rotary_fraction: share of each attention head that mRoPE rotates; ``mrope_section`` sums to
            half of that share of the head dimension.
        deepstack: whether features of vision blocks are added after the first decoder layers, so
            that an engine without DeepStack generates other tokens.
        thinking_prefix: text that the chat template of the Thinking editions writes after
            ``<|im_start|>assistant`` and a newline; empty for a family without such editions.
        thinking_closed: the same text with immediately closed thoughts.
    """

    name: str
    dense: tuple[str, ...]
    moe: tuple[str, ...] = ()
    rotary_fraction: float = 1.0
    deepstack: bool = True
    thinking_prefix: str = ""
    thinking_closed: str = ""

    @property
    def architectures(self) -> tuple[str, ...]:
        """Every architecture of the family."""
        return self.dense + self.moe


QWEN3_VL = ModelFamily(
    name="Qwen3-VL",
    dense=("Qwen3VLForConditionalGeneration",),
    moe=("Qwen3VLMoeForConditionalGeneration",),
    thinking_prefix="<think>\n",
    thinking_closed="<think>\n\n</think>\n\n",
)

FAMILIES: list[ModelFamily] = [QWEN3_VL]
"""Every family, in the order in which errors list them."""


def find_family(architecture: str) -> ModelFamily | None:
    """The family of an architecture; None for an architecture that no family has."""
    return next((one for one in FAMILIES if architecture in one.architectures), None)


def known_architectures() -> tuple[str, ...]:
    """The architectures of every family."""
    return tuple(name for family in FAMILIES for name in family.architectures)
