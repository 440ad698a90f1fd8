"""Chooses and starts one of LMDeploy's engines for a checkpoint. Blocks for minutes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lmdeploy
import torch
from lmdeploy.messages import PytorchEngineConfig, QuantPolicy, TurbomindEngineConfig

import lmdeploy_ext
from lmdeploy_ext import deepstack
from lmdeploy_ext.deepstack import Mode, selftest
from lmdeploy_ext.families import ModelFamily
from lmdeploy_ext.lengths import modes as lengths
from lmdeploy_ext.patch import ExtensionError
from service.engines.common.chat import Chat
from service.engines.common.config import TextConfig
from service.engines.lmdeploy.generations import choose_dtype
from service.engines.lmdeploy.hosts import Host, PyTorchHost, TurboMindHost
from service.engines.lmdeploy.options import (
    CACHE_BITS,
    LENGTHS_BESIDE,
    LENGTHS_COUNTED,
    PYTORCH,
    TURBOMIND,
    Options,
    unsupported,
)
from service.errors import EngineUnavailable

logger = logging.getLogger(__name__)

VERSION: str = lmdeploy.__version__
CACHE_BLOCK = 64
"""Number of tokens in a block of the key-value cache; LMDeploy's default."""

STATE_VARIABLE = "LMDEPLOY_FP32_MAMBA_SSM_DTYPE"
STATE_VALUES = (
    ("lmdeploy.turbomind.turbomind", "_FP32_MAMBA_SSM_DTYPE"),
    ("lmdeploy.pytorch.envs", "fp32_mamba_ssm_dtype"),
)
"""The names under which LMDeploy's modules keep the value of the variable."""


def build_host(
    folder: Path,
    options: Options,
    config: TextConfig,
    chat: Chat,
    context_length: int,
    on_progress: Callable[[str], None],
) -> Host:
    """Start LMDeploy's engine on a checkpoint folder.

    Raises:
        EngineUnavailable: the message says what is wrong and how to fix it.
    """
    _check_machine(options, config)
    if config.state_dtype is not None:
        set_state_dtype(config.state_dtype)
    backend = _available(options, config.family, on_progress)
    on_progress(f"starting LMDeploy {VERSION}, {backend} backend: loading weights")
    try:
        if backend == TURBOMIND:
            return _turbomind(folder, options, config, chat, context_length)
        return _pytorch(folder, options, config, chat, context_length)
    except EngineUnavailable:
        raise
    except torch.cuda.OutOfMemoryError as error:
        raise EngineUnavailable(
            f"the GPU has not enough memory ({_cause(error)}); lower cache_share, context_length "
            "or max_batch, set vision=false, or spread the model with tensor_parallel"
        ) from error
    except Exception as error:  # LMDeploy raises exceptions of any type, often AssertionError
        logger.exception("LMDeploy could not start")
        raise EngineUnavailable(
            f"LMDeploy's {backend} backend cannot start on {folder.name!r}: {_cause(error)}"
        ) from error


def join_logs() -> None:
    """Make LMDeploy write to the log of the service; by default it writes to stdout."""
    log = logging.getLogger("lmdeploy")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.INFO)
    os.environ.setdefault("TM_LOG_LEVEL", "WARNING")  # of TurboMind's module; a line per step else


def hush_logs() -> None:
    """Raise LMDeploy's log level once the engine runs: it would log several lines per request."""
    logging.getLogger("lmdeploy").setLevel(logging.WARNING)


def _check_machine(options: Options, config: TextConfig) -> None:
    if not torch.cuda.is_available():
        raise EngineUnavailable(
            "no NVIDIA GPU is visible: check nvidia-smi, run containers with --gpus all, or use "
            "engine=reference, which runs on a CPU"
        )
    gpus, wanted = torch.cuda.device_count(), options.tensor_parallel
    if wanted > gpus:
        raise EngineUnavailable(f"tensor_parallel is {wanted}, but {gpus} GPUs are visible")
    if config.num_heads % wanted:
        raise EngineUnavailable(
            f"tensor_parallel {wanted} does not divide the model's {config.num_heads} heads"
        )


def set_state_dtype(dtype: str) -> None:
    """Let LMDeploy keep the recurrent state in float32 if the checkpoint asks for it.

    LMDeploy ignores the checkpoint and by default keeps the state in 16 bits, with which answers
    get worse. Its modules read the variable when they are imported, so the values in modules that
    have been imported are set, too.
    """
    wanted = dtype == "float32"
    os.environ[STATE_VARIABLE] = "1" if wanted else "0"
    for module, name in STATE_VALUES:
        if module in sys.modules:
            setattr(sys.modules[module], name, wanted)


def _available(options: Options, family: ModelFamily, on_progress: Callable[[str], None]) -> str:
    """Prepare the chosen backend. If TurboMind cannot be prepared, ``auto`` uses the PyTorch
    engine.

    Raises EngineUnavailable.
    """
    chosen = options.backend_for(has_deepstack=family.deepstack)
    refusal = unsupported(options, chosen, has_deepstack=family.deepstack)
    if refusal is not None:  # the settings were checked for models with DeepStack
        raise EngineUnavailable(refusal)
    if chosen != TURBOMIND:
        return PYTORCH
    if not family.extension:
        return TURBOMIND
    try:
        _prepare_turbomind(options, on_progress)
    except EngineUnavailable as error:
        refusal = unsupported(options, PYTORCH)
        if options.backend != "auto" or options.deepstack == "require" or refusal is not None:
            raise
        logger.warning("%s Taking LMDeploy's PyTorch engine.", error.message)
        return PYTORCH
    return TURBOMIND


def _prepare_turbomind(options: Options, on_progress: Callable[[str], None]) -> None:
    """Add Qwen3-VL to TurboMind, with DeepStack if the server accepts images."""
    try:
        lmdeploy_ext.install(options.deepstack if options.vision else None)
        if not options.vision and not lmdeploy_ext.is_installed():
            lmdeploy_ext.uninstall()  # only DeepStack failed, and text needs no DeepStack
            lmdeploy_ext.install("off")
    except ExtensionError as error:
        raise EngineUnavailable(
            f"Qwen3-VL cannot be added to TurboMind: {error} backend=pytorch does without."
        ) from error
    problem = None if lmdeploy_ext.is_installed() else deepstack.status().reason
    if problem is None and options.vision and options.deepstack != "off":
        on_progress("checking DeepStack")
        problem = selftest.verify()
    if problem is not None:
        raise EngineUnavailable(
            f"TurboMind cannot be given DeepStack, which images need: {problem}. "
            "backend=pytorch has it; deepstack=off goes without, for worse answers about images."
        )


def _turbomind(
    folder: Path, options: Options, config: TextConfig, chat: Chat, context_length: int
) -> Host:
    from lmdeploy import turbomind

    options = with_dtype(options, config)
    try:
        limiter = lengths.enter(Mode(options.string_lengths))
    except ExtensionError as error:
        raise EngineUnavailable(str(error)) from error
    native = turbomind.TurboMind.from_pretrained(
        str(folder), engine_config=turbomind_config(options, context_length, config.family)
    )
    return TurboMindHost(native, turbomind._tm, chat.table, config.stop_ids, limiter)


def with_dtype(options: Options, config: TextConfig) -> Options:
    """The options with the type in which TurboMind computes on this GPU, see
    `service.engines.lmdeploy.generations`.

    Raises EngineUnavailable.
    """
    model_format: str = options.model_format
    if model_format == "auto":
        model_format = config.quantisation or "hf"
    dtype = choose_dtype(
        options.dtype, config.dtype, model_format, _gpu(), torch.cuda.get_device_capability(0)
    )
    return options.model_copy(update={"dtype": dtype})


def _pytorch(
    folder: Path, options: Options, config: TextConfig, chat: Chat, context_length: int
) -> Host:
    from lmdeploy.pytorch.engine import Engine

    native = Engine.from_pretrained(
        str(folder), engine_config=pytorch_config(options, context_length)
    )
    return PyTorchHost(native, chat.table, config.stop_ids, sorted(chat.special_ids))


def turbomind_config(
    options: Options, context_length: int, family: ModelFamily
) -> TurbomindEngineConfig:
    """TurboMind's settings. All others keep LMDeploy's defaults."""
    return TurbomindEngineConfig(
        **_common(options, session_length(context_length, options.prefill_chunk)),
        **_cache_options(options, family),
        quant_policy=CACHE_BITS[options.cache_type],
        model_format=None if options.model_format == "auto" else options.model_format,
    )


def _cache_options(options: Options, family: ModelFamily) -> dict[str, Any]:
    """The settings of the family. A recurrent state can be kept at the end of every prefill chunk,
    so operators decide with the length of a chunk how often prompts share a beginning."""
    interval = "cache_checkpoint_interval"
    found = dict(family.turbomind_options)
    if interval in found:
        found[interval] = min(found[interval], options.prefill_chunk)
    return found


def pytorch_config(options: Options, context_length: int) -> PytorchEngineConfig:
    """The PyTorch engine's settings. All others keep LMDeploy's defaults."""
    return PytorchEngineConfig(
        **_common(options, context_length),
        quant_policy=QuantPolicy(CACHE_BITS[options.cache_type]),
    )


def session_length(context_length: int, prefill_chunk: int) -> int:
    """TurboMind's session length: at least one token more than the context.

    TurboMind warms up with prompts of some even lengths, of one chunk, and of one chunk plus one
    block. The process crashes if a session has no room for one more token after such a prompt.
    """
    length = context_length + 1 | 1
    blocked = {prefill_chunk, prefill_chunk + CACHE_BLOCK}
    while length in blocked:
        length += 2
    return length


def _common(options: Options, session_len: int) -> dict[str, Any]:
    return {
        "dtype": options.dtype,
        "tp": options.tensor_parallel,
        "session_len": session_len,
        "max_batch_size": options.max_batch,
        "cache_max_entry_count": options.cache_share,
        "max_prefill_token_num": options.prefill_chunk,
        "enable_prefix_caching": options.prefix_caching,
        "language_model_only": not options.vision,
        "enable_metrics": True,
    }


def feature_dtype(host: Host, config: TextConfig) -> torch.dtype:
    """The dtype of the pixels for the vision tower."""
    name = str(getattr(host.native.engine_config, "dtype", "auto"))
    if name not in ("bfloat16", "float16"):
        name = config.dtype
    return torch.float16 if name == "float16" else torch.bfloat16


def describe(host: Host, options: Options, config: TextConfig) -> dict[str, str]:
    """Details of the engine for operators."""
    return {
        "backend": host.backend,
        "backend_chosen": _chosen_by(host.backend, options, config.family),
        "family": config.family.name,
        **(_deepstack(host, options) if config.family.deepstack else {"deepstack": "none"}),
        "string_lengths": LENGTHS_BESIDE if host.limits_lengths else LENGTHS_COUNTED,
        **_state(host, config),
        "lmdeploy": VERSION,
        "torch": torch.__version__,
        "dtype": str(feature_dtype(host, config)).removeprefix("torch."),
        "device": _gpu(),
        "tensor_parallel": str(options.tensor_parallel),
        "max_batch": str(options.max_batch),
        "cache_share": str(options.cache_share),
        "cache_type": options.cache_type,
        "prefix_caching": str(options.prefix_caching).lower(),
        "model_format": options.model_format,
    }


def _deepstack(host: Host, options: Options) -> dict[str, str]:
    active = options.vision and (host.backend == PYTORCH or deepstack.status().active)
    return {
        "deepstack": "on" if active else "off",
        "deepstack_mode": options.deepstack,
        "deepstack_by": _deepstack_by(host.backend) if active else "nothing",
    }


def _state(host: Host, config: TextConfig) -> dict[str, str]:
    """The dtype of the recurrent state: float32, or that of the model."""
    if config.state_dtype is None:
        return {}
    kept = "float32" if config.state_dtype == "float32" else feature_dtype(host, config)
    return {"state_dtype": str(kept).removeprefix("torch.")}


def _chosen_by(backend: str, options: Options, family: ModelFamily) -> str:
    """The reason for the chosen backend, without paths and addresses, which callers must not
    see."""
    if options.backend != "auto":
        return "operator"
    if backend != options.backend_for(has_deepstack=family.deepstack):
        return "auto, as TurboMind cannot be given DeepStack here; the log says why"
    return "auto"


def _deepstack_by(backend: str) -> str:
    return "LMDeploy's PyTorch engine" if backend == PYTORCH else "the hook on TurboMind"


def _gpu() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"


def _cause(error: Exception) -> str:
    """The first line of an error message."""
    lines: Sequence[str] = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
