"""What transformers answers under options that change which token is chosen, and to which requests its
answer does not hang on rounding."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xgrammar
from transformers import AutoTokenizer, LogitsProcessor

from lmdeploy_ext.packing import PackedImage, PackedRequest, pack
from tests.host_runtime.cases import Case, _model, expected
from tests.host_runtime.checkpoints import image_token
from tests.host_runtime.parity import TIE, Expected, difference
from tests.service.engines.reference.oracle import engine_greedy, loaded


class Grammar(LogitsProcessor):
    """The mask of a JSON schema over each row's next token, by the xgrammar that pip installs."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, prompt: int, vocabulary: int) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._prompt = prompt
        self._mask = xgrammar.allocate_token_bitmask(1, vocabulary)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > self._prompt:
            assert self._matcher.accept_token(int(ids[0, -1]))
        self._matcher.fill_next_token_bitmask(self._mask)
        xgrammar.apply_token_bitmask_inplace(scores, self._mask)
        return scores


@lru_cache(maxsize=32)
def _compiled(folder: Path, schema: str, vocabulary: int) -> xgrammar.CompiledGrammar:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary)
    # As the module's compiler does by default: one form of white space.
    return xgrammar.GrammarCompiler(info).compile_json_schema(schema, any_whitespace=False)


@torch.inference_mode()
def expected_under_options(folder: Path, case: Case) -> Expected:
    """Greedy tokens of transformers in float32 with ``stop_token_ids``, ``repetition_penalty`` and
    ``response_format`` of a case, and how far each chosen token leads behind the processors."""
    model = _model(folder, True)
    ids = torch.tensor([case.tokens])
    values: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if case.grids:
        values["pixel_values"] = torch.cat(case.pixels()).float()
        values["image_grid_thw"] = torch.tensor(case.grids)
        values["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    processors = []
    if form := case.options.get("response_format"):
        vocabulary = model.config.text_config.vocab_size
        compiled = _compiled(folder, json.dumps(form["json_schema"]["schema"]), vocabulary)
        processors.append(Grammar(compiled, len(case.tokens), vocabulary))
    out = model.generate(
        **values, max_new_tokens=case.max_new_tokens, do_sample=False,
        eos_token_id=case.options.get("stop_token_ids"), logits_processor=processors,
        repetition_penalty=case.options.get("repetition_penalty", 1.0),
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.cat(out.scores).float().topk(2, dim=-1).values
    return Expected(
        out.sequences[0, len(case.tokens) :].tolist(), (best[:, 0] - best[:, 1]).tolist()
    )


def clear(folder: Path, cases: Iterable[Case], count: int, lead: float = TIE / 2) -> list[Case]:
    """The first requests whose answer no near tie decides, neither of tokens nor of experts:
    transformers in bfloat16 says what it says in float32, and each token has that lead."""

    def is_clear(case: Case) -> bool:
        exact = expected(folder, case)
        if min(exact.leads) < lead:
            return False
        return exact.tokens == expected(folder, case, dtype=torch.bfloat16).tokens

    found = list(islice(filter(is_clear, cases), count))
    assert len(found) == count, "more requests are needed to choose from"
    return found


def packed(folder: Path, case: Case) -> PackedRequest:
    """A case as the service's own engine takes it."""
    segments: list[list[int] | PackedImage] = []
    end = 0
    for (begin, behind), grid, patches in zip(case.spans, case.grids, case.patches(), strict=True):
        segments += [case.tokens[end:begin], PackedImage(patches.numpy(), grid)]
        end = behind
    return pack([*segments, case.tokens[end:]], image_token(folder))


def check_reference_engine(
    folder: Path, cases: Iterable[Case], wanted: Iterable[Expected], piece: int = 64
) -> None:
    """The service's own engine, in float32, says of every request what transformers says.

    It ends at end tokens.
    """
    model = loaded(folder, prefill_piece=piece)
    for index, (case, want) in enumerate(zip(cases, wanted, strict=True)):
        tokens = engine_greedy(model, packed(folder, case), case.max_new_tokens)
        count = len(tokens)
        beginning = Expected(want.tokens[:count], want.leads[:count])
        assert difference(tokens, beginning, tie=0.001) is None, index
        if tokens == beginning.tokens and count < case.max_new_tokens:
            assert want.tokens[count] in model.config.stop_ids, index
