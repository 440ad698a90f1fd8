"""Loads a checkpoint and builds everything that requests need."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from service.engines.common.chat import Chat
from service.engines.common.config import CheckpointError, TextConfig, commit_of
from service.engines.common.detokenizer import Detokenizer
from service.engines.common.grammar import (
    CompiledGrammar,
    GrammarCompiler,
    Matcher,
    compile_threads,
)
from service.engines.common.images import ImagePreprocessor
from service.engines.common.loops import LoopGuard
from service.engines.common.prompts import Prompts
from service.engines.reference.cache import KeyValueCache
from service.engines.reference.decoder import Decoder, Pass
from service.engines.reference.linear import padded, row_invariant
from service.engines.reference.options import Options
from service.engines.reference.rotary import Rotary
from service.engines.reference.runner import Runner
from service.engines.reference.sampler import Sampler
from service.engines.reference.sequence import Event, Sequence
from service.engines.reference.vision import FeatureSource
from service.engines.reference.weights import Checkpoint
from service.errors import EngineUnavailable
from service.types import Sampling

if TYPE_CHECKING:
    from lmdeploy_ext.packing import PackedRequest

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Size of weights, in bytes, up to which `auto` means float32 on a CPU without bfloat16 instructions.
_FLOAT32_LIMIT = 1 << 30
_SMALL_HIDDEN = 1024  # for smaller models, several threads are slower than one
_DRAFT = 12  # tokens
_DRAFT_CHARACTERS = 400  # more than so many tokens hold; longer texts need not be kept


@dataclass(slots=True)
class Model:
    """Decoder, key-value cache, tokenizer, grammar compiler and vision tower of one checkpoint."""

    config: TextConfig
    decoder: Decoder
    cache: KeyValueCache
    rotary: Rotary
    runner: Runner
    chat: Chat
    compiler: GrammarCompiler
    prompts: Prompts
    vision: FeatureSource | None
    context_length: int
    drafts: dict[str, list[int]]
    commit: str | None

    @property
    def batch_invariant(self) -> bool:
        """Whether logits alone and in a batch are equal bit for bit."""
        return row_invariant(self.decoder.dtype, self.decoder.device)

    def inference(self) -> AbstractContextManager[None]:
        """The context manager in which the decoding thread must run."""
        return torch.inference_mode()

    def details(self) -> dict[str, str]:
        """Details for operators."""
        origin = {} if self.commit is None else {"commit": self.commit}
        return origin | {
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            "device": str(self.decoder.device),
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
            "deepstack": "on" if self.vision is not None and self.vision.deepstack else "off",
            "batch_invariant": str(self.batch_invariant).lower(),
            "memory_rows": str(self.cache.runs.size),
        }

    def sequence(
        self,
        prompt: PackedRequest,
        features: tuple[torch.Tensor, ...],
        sampling: Sampling,
        compiled: CompiledGrammar | None,
        *,
        max_tokens: int,
        emit: Callable[[Event], None],
        received: float,
        guard: LoopGuard,
    ) -> Sequence:
        """The state of a new request. max_tokens: maximum number of answer tokens; they fit into
        the context."""
        ids = torch.from_numpy(prompt.token_ids.astype("int64"))
        return Sequence(
            prompt,
            features,
            max_tokens,
            sampler=lambda: Sampler(sampling, ids, self.config.vocab_size),
            matcher=None if compiled is None else lambda: Matcher(compiled, self.compiler),
            detokenizer=Detokenizer(
                self.chat.table,
                thinks=self.config.thinks(
                    constrained=compiled is not None, thinking=sampling.thinking
                ),
            ),
            guard=guard,
            stop_ids=frozenset(self.config.stop_ids),
            emit=emit,
            received=received,
        )

    def draft(self, sequence: Sequence) -> list[int]:
        """Draft tokens for the text that the grammar forces next, as many as the sequence has room
        for.

        The model still decides how the text is split into tokens: draft tokens are computed in the
        same pass, and discarded from the first wrong token on.
        """
        text = "" if sequence.matcher is None else sequence.matcher.forced_text()
        text = text[:_DRAFT_CHARACTERS]
        if not text:
            return []
        ids = self.drafts.get(text)
        if ids is None:
            if len(self.drafts) >= 4096:
                self.drafts.clear()
            ids = self.drafts[text] = self.chat.encode(text)[:_DRAFT]
        return ids[: sequence.reserved - sequence.computed - 1]


def load_model(folder: Path, options: Options, on_progress: Callable[[str], None]) -> Model:
    """Read a checkpoint and warm it up.

    Raises:
        EngineUnavailable: the checkpoint or the options cannot be used; the message says why.
    """
    try:
        return _load(folder, options, on_progress)
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        cause = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        logger.error("loading %s failed: %s", folder, cause)
        raise EngineUnavailable(f"{folder.name!r} cannot be loaded: {cause}") from error


def _load(folder: Path, options: Options, on_progress: Callable[[str], None]) -> Model:
    config = TextConfig.from_checkpoint(folder)
    if config.family.recurrent:
        raise CheckpointError(
            f"models of the family {config.family.name} have layers with a recurrent state, which "
            "engine=reference cannot run; take engine=lmdeploy"
        )
    device = _device(options.device)
    checkpoint = Checkpoint(folder, config)
    dtype = _dtype(options.dtype, config, checkpoint.num_values * 4, device)
    torch.set_num_threads(options.threads or _threads(config))
    on_progress("reading the decoder")
    decoder = Decoder(
        config, checkpoint, dtype, device, lambda share: on_progress(f"decoder {share:.0%}")
    )
    rows, context = _memory(config, options, dtype, device)
    cache = KeyValueCache(
        config.num_layers, config.num_kv_heads, config.head_dim, rows, dtype, device
    )
    rotary = Rotary(config.rope_theta, config.mrope_section, context, device)
    chat = Chat(folder, config)
    preprocess = vision = None
    if options.vision:
        on_progress("reading the vision tower")
        preprocess = ImagePreprocessor(folder)
        vision = _vision(folder, options, dtype, device)
    model = Model(
        config=config,
        decoder=decoder,
        cache=cache,
        rotary=rotary,
        runner=Runner(decoder, cache, rotary, options.prefill_piece),
        chat=chat,
        compiler=GrammarCompiler(chat.table, config.stop_ids, compile_threads()),
        prompts=Prompts(chat, preprocess, context),
        vision=vision,
        context_length=context,
        drafts={},
        commit=commit_of(folder),
    )
    on_progress("warming up")
    _warm_up(model, options)
    on_progress("ready")
    return model


@torch.inference_mode()
def _warm_up(model: Model, options: Options) -> None:
    """Run one pass of every common size, so that oneDNN generates its code before the first
    request."""
    rows, largest = 1, options.prefill_piece
    if model.config.hidden_size >= _SMALL_HIDDEN:
        # For larger sizes, generating the code takes little time compared to the pass itself.
        largest = min(max(4 * options.max_batch, 64), largest)
    while rows <= largest:
        size = padded(rows)
        ids = torch.zeros(size, dtype=torch.int64, device=model.decoder.device)
        step = Pass(
            model.decoder.embed(ids),
            model.rotary.for_text(ids),
            torch.full_like(ids, model.cache.spare),
            [(0, 1)],
            prompt=0,
        )
        model.decoder.logits(model.decoder.forward(step, model.cache))
        rows = size + 1


def _vision(
    folder: Path, options: Options, dtype: torch.dtype, device: torch.device
) -> FeatureSource:
    from lmdeploy_ext.encoder import VisionEncoder

    encoder = VisionEncoder.from_checkpoint(folder, dtype, device)
    return FeatureSource(encoder, options.vision_cache_bytes, options.deepstack)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("device is cuda, but torch sees no GPU; use device cpu")
    return device


def _dtype(name: str, config: TextConfig, float32_bytes: int, device: torch.device) -> torch.dtype:
    """The dtype. ``auto`` means the checkpoint's dtype, or float32 for a small checkpoint on a CPU
    without bfloat16 instructions."""
    if name == "auto":
        fast = device.type != "cpu" or _multiplies_bfloat16()
        name = config.dtype if fast or float32_bytes > _FLOAT32_LIMIT else "float32"
    if name == "float16" and device.type == "cpu":
        name = "bfloat16"
    if name not in DTYPES:
        raise CheckpointError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _multiplies_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions; False if torch cannot tell."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def _threads(config: TextConfig) -> int:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return 1 if config.hidden_size < _SMALL_HIDDEN else cores


def _memory(
    config: TextConfig, options: Options, dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """The number of rows of the key-value pool, and the context length."""
    row_bytes = config.kv_values_per_token * dtype.itemsize
    wanted = options.context_length or config.max_position_embeddings
    if wanted > config.max_position_embeddings:
        raise CheckpointError(
            f"context_length {wanted} exceeds the model's {config.max_position_embeddings}"
        )
    affordable = options.cache_bytes // row_bytes
    if options.context_length and affordable < wanted:
        raise CheckpointError(
            f"a context of {wanted} tokens needs {wanted * row_bytes} bytes of key-value memory; "
            f"cache_bytes is {options.cache_bytes}"
        )
    context = min(wanted, affordable)
    return min(affordable, context * options.max_batch), context
