"""The process of the self-test: ``python -m lmdeploy_ext.deepstack.trial RESULT``. See `selftest`.

It creates a tiny random Qwen3-VL whose DeepStack features are as large as its hidden states. Stock
TurboMind with the hook continues prompts with images, some in several prefill chunks. Then
transformers computes the logits of each prompt with TurboMind's answer, in float32 on the CPU.
Every token of the answer must have the best logit, or one that 16-bit numbers cannot distinguish
from the best.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB, IMAGE, VIDEO = 512, 500, 501
TIE = 0.15
"""Maximum difference to the best logit. The standard deviation of the logits is near 1."""
ANSWER = 6
"""Number of tokens of each answer."""
LOUD = 2.5
"""Scale of the features. As large as the hidden states, so that the test also notices features that
are added twice."""
LIMIT_S = 240
CHUNK = 64
"""Number of tokens in one prefill forward. The last `PROMPTS` are longer and are cut inside
images."""
PROMPTS: tuple[tuple[tuple[int, ...], tuple[tuple[int, int], ...]], ...] = (
    ((5, 4), ((4, 4),)),
    ((1, 7), ((8, 6),)),
    ((3, 2, 9), ((4, 8), (6, 4))),
    ((20,), ()),
    ((9, 3, 4, 6), ((6, 6), (8, 12), (4, 4))),
    ((8, 12, 5), ((12, 14), (10, 8))),
    ((30, 2), ((12, 16),)),
    ((50, 3), ((10, 12),)),
)
"""Number of words before each image and after the last, and the grids of the images (height, width)
in patches."""

_alive: list[Any] = []


@dataclass(frozen=True)
class Prompt:
    """Token ids, half-open spans of image tokens, pixels (h*w, 1536) and patches (h, w) of images."""

    tokens: list[int]
    spans: list[tuple[int, int]]
    pixels: list[Tensor]
    grids: list[tuple[int, int]]


def write_model(folder: Path) -> None:
    """Write the random checkpoint, in bfloat16 and with sizes for which TurboMind has kernels."""
    from tokenizers import Tokenizer, models
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 256, "head_dim": 128,
            "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 1024, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        vision_config={
            "hidden_size": 128, "depth": 4, "num_heads": 2, "intermediate_size": 256,
            "num_position_embeddings": 36, "out_hidden_size": 256,
            "deepstack_visual_indexes": [0, 1, 3],
        },
        tie_word_embeddings=True, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=502, vision_end_token_id=503,
    )  # fmt: skip
    model: Any = Qwen3VLForConditionalGeneration(config)
    model.to(torch.bfloat16)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_values(name, parameter, source))
    model.tie_weights()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = VOCAB - 1
    model.save_pretrained(folder)
    words = {f"<{index}>": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    end = f"<{VOCAB - 1}>"
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, eos_token=end, pad_token=end).save_pretrained(folder)


def _values(name: str, like: Tensor, source: torch.Generator) -> Tensor:
    """Random weights, scaled so that every layer affects the answer and rounding does not decide
    tokens."""
    values = torch.randn(like.shape, generator=source)
    if "norm" in name and name.endswith("weight"):
        return torch.rand(like.shape, generator=source) + 0.5
    if "pos_embed" in name:
        return values
    if like.dim() == 1:
        return values * 0.2
    loud = "deepstack_merger_list" in name and "linear_fc2" in name
    return values * ((LOUD if loud else 1.2) / math.sqrt(like[0].numel()))


def prompts() -> list[Prompt]:
    """The prompts of `PROMPTS` with random words and pixels."""
    source = torch.Generator().manual_seed(1)
    made = []
    for words, grids in PROMPTS:
        tokens: list[int] = []
        spans, pixels = [], []
        for index, count in enumerate(words):
            tokens += torch.randint(10, 300, (count,), generator=source).tolist()
            if index < len(grids):
                height, width = grids[index]
                spans.append((len(tokens), len(tokens) + height * width // 4))
                tokens += [IMAGE] * (height * width // 4)
                values = torch.rand((height * width, 1536), generator=source) - 0.5
                values += torch.rand((height * width, 1), generator=source) - 0.5
                pixels.append(values.bfloat16())
        made.append(Prompt(tokens, spans, pixels, list(grids)))
    return made


def answers(folder: Path, asked: Sequence[Prompt]) -> list[list[int]]:
    """TurboMind's greedy tokens, all prompts at once.

    Raises:
        lmdeploy_ext.patch.ExtensionError: the functions cannot be intercepted.
    """
    import lmdeploy_ext

    lmdeploy_ext.install("require")
    from lmdeploy import TurbomindEngineConfig
    from lmdeploy.turbomind.turbomind import TurboMind

    settings = TurbomindEngineConfig(
        dtype="bfloat16", session_len=257, max_batch_size=4, max_prefill_token_num=CHUNK,
        cache_max_entry_count=0.1,
    )  # fmt: skip
    engine = TurboMind.from_pretrained(str(folder), engine_config=settings)
    # LMDeploy 0.18.0 aborts if an engine is deleted while its thread still reports a finished
    # request.
    _alive.append(engine)

    async def ask_all() -> list[list[int]]:
        return await asyncio.gather(*(_ask(engine, n, one) for n, one in enumerate(asked, 1)))

    return asyncio.run(ask_all())


async def _ask(engine: Any, number: int, prompt: Prompt) -> list[int]:
    from lmdeploy import GenerationConfig
    from lmdeploy.vl.constants import Modality

    config = GenerationConfig(max_new_tokens=ANSWER, do_sample=False, top_k=1, ignore_eos=True)
    items = [
        {
            "modality": Modality.IMAGE,
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, *grid]]),
            "offset": span,
        }
        for pixels, grid, span in zip(prompt.pixels, prompt.grids, prompt.spans, strict=True)
    ]
    stream = engine.create_instance().async_stream_infer(
        number, input_ids=prompt.tokens, multimodal=items or None, gen_config=config,
        stream_output=True,
    )  # fmt: skip
    found: list[int] = []
    async with aclosing(stream) as chunks:
        async for chunk in chunks:
            found += list(chunk.token_ids)
    return found


def reference(folder: Path) -> Any:
    """transformers' model of the checkpoint, in float32 on the CPU."""
    from transformers import Qwen3VLForConditionalGeneration

    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def lag(model: Any, prompt: Prompt, answer: Sequence[int]) -> float:
    """The largest difference between the best logit and the logit of the answer's token."""
    ids = torch.tensor([[*prompt.tokens, *answer[:-1]]])
    # If the model itself generates an image placeholder, there is no image: stop the comparison
    # there.
    ids[0, len(prompt.tokens) :][ids[0, len(prompt.tokens) :] == IMAGE] = 0
    values: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.pixels:
        values["pixel_values"] = torch.cat(prompt.pixels).float()
        values["image_grid_thw"] = torch.tensor([[1, *grid] for grid in prompt.grids])
        values["mm_token_type_ids"] = (ids == IMAGE).int()
    logits = model(**values, logits_to_keep=len(answer)).logits[0].float()
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    compared = answer.index(IMAGE) + 1 if IMAGE in answer else len(answer)
    return float((logits.amax(dim=1) - chosen)[:compared].max())


def compare(folder: Path, asked: Sequence[Prompt], given: Sequence[Sequence[int]]) -> str | None:
    """A short description of the problem with TurboMind's answers; None if there is none."""
    short = [len(answer) for answer in given if len(answer) != ANSWER]
    if short:
        return f"an answer of a random model has {short[0]} tokens instead of {ANSWER}"
    model = reference(folder)
    behind = [lag(model, *pair) for pair in zip(asked, given, strict=True)]
    wrong = sum(one >= TIE for one in behind)
    if not wrong:
        return None
    return (
        f"{wrong} of {len(behind)} answers of a random model are not those of transformers (a "
        f"token's logit is {max(behind):.2f} behind the best; {TIE} may be rounding)"
    )


def main(result: Path) -> None:
    """Write ``{"problem": text or null}`` to a file and end the process."""
    # If TurboMind hangs, the alarm ends this process; the parent notices that the file is missing.
    timer = threading.Timer(LIMIT_S, os._exit, [1])
    timer.daemon = True
    timer.start()
    with tempfile.TemporaryDirectory(prefix="lmdeploy-ext-") as folder:
        path = Path(folder)
        write_model(path)
        asked = prompts()
        problem = compare(path, asked, answers(path, asked))
    result.write_text(json.dumps({"problem": problem}))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the engine's threads would wait for requests forever


if __name__ == "__main__":
    main(Path(sys.argv[1]))
