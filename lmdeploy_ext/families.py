"""Model families as data: the differences between the models that this project supports.

A family is one record in `FAMILIES`. Code reads the record instead of comparing names of
architectures, so that for the reference engine a new family needs only a record. TurboMind may
also need a source model, see docs/extending.md. Imports no heavy packages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PromptFormat = Literal["qwen3-vl", "qwen3.5"]


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
        extension: whether LMDeploy's TurboMind needs this project's extension for these models.
        recurrent: whether some layers keep a recurrent state instead of keys and values. The
            reference engine has no such layers.
        prompt_format: the chat template, see `service/engines/common/chat_template.py`.
        thinking_prefix: text that the chat template writes after ``<|im_start|>assistant`` and a
            newline where the answer begins with thoughts; empty for a family that never thinks.
        thinking_closed: the same text with immediately closed thoughts.
        thinking_optional: whether each request may choose to think. Otherwise a model of the family
            always thinks or never, which its chat template shows.
        schema_in_prompt: whether the models follow a JSON schema that they read in the prompt; it is
            then shown unless a caller says otherwise. A ``config.json`` with the same key wins.
        turbomind_options: settings of LMDeploy's ``TurbomindEngineConfig`` for these models. A
            ``cache_checkpoint_interval`` is lowered to the length of a prefill chunk.
    """

    name: str
    dense: tuple[str, ...]
    moe: tuple[str, ...] = ()
    rotary_fraction: float = 1.0
    deepstack: bool = True
    extension: bool = True
    recurrent: bool = False
    prompt_format: PromptFormat = "qwen3-vl"
    thinking_prefix: str = ""
    thinking_closed: str = ""
    thinking_optional: bool = False
    schema_in_prompt: bool = True
    turbomind_options: Mapping[str, Any] = field(default_factory=dict)

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
QWEN3_5 = ModelFamily(
    name="Qwen3.5",
    dense=("Qwen3_5ForConditionalGeneration",),
    moe=("Qwen3_5MoeForConditionalGeneration",),
    rotary_fraction=0.25,
    deepstack=False,
    extension=False,
    recurrent=True,
    prompt_format="qwen3.5",
    thinking_prefix="<think>\n",
    thinking_closed="<think>\n\n</think>\n\n",
    thinking_optional=True,
    turbomind_options={
        # A recurrent state can only be continued where it was kept: by default every 4096 tokens,
        # so that most prompts would find nothing in the prefix cache. A kept state is large (about
        # 150 MB for 27B), so it is not kept often either: at the end of a prompt, and at the ends
        # of prefill chunks.
        "cache_checkpoint_interval": 1024,
        "cache_prompt": "all",
        # The next prompt of a conversation continues before the four tokens of closed thoughts.
        "cache_prompt_boundary_skip": 4,
    },
)

FAMILIES: list[ModelFamily] = [QWEN3_VL, QWEN3_5]
"""Every family, in the order in which errors list them."""


def find_family(architecture: str) -> ModelFamily | None:
    """The family of an architecture; None for an architecture that no family has."""
    return next((one for one in FAMILIES if architecture in one.architectures), None)


def known_architectures() -> tuple[str, ...]:
    """The architectures of every family."""
    return tuple(name for family in FAMILIES for name in family.architectures)
