"""Converts sampling options to LMDeploy's ``GenerationConfig``.

Every field is set, so that neither LMDeploy's defaults (top_k 50, temperature 0.8) nor those of the
checkpoint's generation_config.json have an effect. The object is passed directly to the engine
instance; LMDeploy's async engine would reset the repetition penalty of greedy requests.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from lmdeploy.messages import GenerationConfig

from lmdeploy_ext.families import ModelFamily
from service.engines.lmdeploy.options import PYTORCH, TURBOMIND
from service.errors import InvalidRequest
from service.types import Sampling

HONOURED = frozenset({"max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"})
"""Fields of ``Sampling`` that both backends support for every model."""
TOP_K_LIMIT = {TURBOMIND: 1024}
"""Maximum top_k of TurboMind's kernel, which silently lowers larger values."""


def honoured(family: ModelFamily) -> frozenset[str]:
    """Fields of ``Sampling`` that both backends support for a family of models."""
    return HONOURED | {"thinking"} if family.thinking_optional else HONOURED


def check(sampling: Sampling, backend: str) -> None:
    """Refuse a value that the backend would change silently. Raises InvalidRequest on its field."""
    limit = TOP_K_LIMIT.get(backend)
    if limit is not None and sampling.top_k > limit:
        raise InvalidRequest(
            "sampling.top_k",
            f"is {sampling.top_k}; this engine takes at most {limit}, or none for all tokens",
            reason="SAMPLING_OPTION_INVALID",
        )


def generation_config(
    sampling: Sampling,
    backend: str,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    bad_ids: Sequence[int] = (),
    response_format: Mapping[str, Any] | None = None,
) -> GenerationConfig:
    """The ``GenerationConfig`` for the options.

    max_new_tokens: maximum number of tokens that the engine computes; replaces
        ``sampling.max_tokens``.
    bad_ids: tokens that must not be generated.
    """
    # Greedy means top_k 1: only LMDeploy's async engine reads do_sample.
    greedy = sampling.temperature == 0
    return GenerationConfig(
        n=1,
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        top_p=1.0 if greedy else sampling.top_p,
        top_k=1 if greedy else sampling.top_k,
        min_p=0.0,
        temperature=1.0 if greedy else sampling.temperature,
        repetition_penalty=sampling.repetition_penalty,
        ignore_eos=False,
        random_seed=_seed(sampling.seed, backend),
        stop_words=None,
        bad_words=None,
        stop_token_ids=list(stop_ids),
        bad_token_ids=list(bad_ids) or None,
        min_new_tokens=0,
        skip_special_tokens=True,
        spaces_between_special_tokens=False,
        logprobs=None,
        logprob_start_len=-1,
        response_format=None if response_format is None else dict(response_format),
        logits_processors=None,
        output_logits=None,
        output_last_hidden_state=None,
        include_stop_str_in_output=False,
        return_ppl=False,
        with_cache=False,
        preserve_cache=False,
        migration_request=None,
        return_routed_experts=False,
        repetition_ngram_size=0,
        repetition_ngram_threshold=0,
    )


def _seed(seed: int | None, backend: str) -> int:
    """The seed; a random seed if the caller gave none. LMDeploy's PyTorch engine supports 32
    bits."""
    if seed is None:
        return secrets.randbits(32 if backend == PYTORCH else 64)
    return (seed ^ (seed >> 32)) & 0xFFFF_FFFF if backend == PYTORCH else seed
