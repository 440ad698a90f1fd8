"""What the LMDeploy engine makes of the record of a family: settings, backend, state, details."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lmdeploy_ext.families import QWEN3_5, QWEN3_VL
from service.engines.lmdeploy.options import PYTORCH, TURBOMIND, Options
from service.errors import EngineUnavailable

pytestmark = pytest.mark.slow  # importing LMDeploy takes seconds


def test_a_recurrent_family_keeps_states_at_the_ends_of_prompts_and_chunks() -> None:
    from lmdeploy.messages import TurbomindEngineConfig

    from service.engines.lmdeploy.building import turbomind_config

    def kept(chunk: int, family: Any) -> tuple[str, int, int]:
        found = turbomind_config(Options("model", prefill_chunk=chunk), 4096, family)
        return found.cache_prompt, found.cache_prompt_boundary_skip, found.cache_checkpoint_interval

    stock = TurbomindEngineConfig()
    assert kept(256, QWEN3_VL) == (
        stock.cache_prompt, stock.cache_prompt_boundary_skip, stock.cache_checkpoint_interval
    )  # fmt: skip
    assert kept(8192, QWEN3_5) == ("all", 4, 1024)
    assert kept(256, QWEN3_5) == ("all", 4, 256)


@pytest.mark.parametrize(("dtype", "on"), [("float32", True), ("bfloat16", False)])
def test_the_state_has_the_precision_of_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, dtype: str, on: bool
) -> None:
    """Whether or not LMDeploy's modules have been imported before."""
    from service.engines.lmdeploy import building

    monkeypatch.setenv(building.STATE_VARIABLE, "other")
    for name, value in building.STATE_VALUES:
        module: Any = ModuleType(name)
        setattr(module, value, None)
        monkeypatch.setitem(sys.modules, name, module)
    building.set_state_dtype(dtype)
    assert os.environ[building.STATE_VARIABLE] == ("1" if on else "0")
    for name, value in building.STATE_VALUES:
        assert getattr(sys.modules[name], value) is on


@pytest.mark.host
def test_lmdeploy_keeps_the_precision_under_the_names_that_are_set() -> None:
    from tests.host_runtime.runner import run

    assert run(_names, mode="driver") == [False, False]


def _names() -> list[bool]:
    from service.engines.lmdeploy.building import STATE_VALUES

    return [getattr(importlib.import_module(name), value) for name, value in STATE_VALUES]


def test_a_model_without_deepstack_needs_neither_the_extension_nor_one_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from service.engines.lmdeploy import building

    def never(*_: object) -> None:
        raise AssertionError("the extension is installed")

    monkeypatch.setattr(building, "_prepare_turbomind", never)

    def available(**options: Any) -> str:
        return building._available(Options("model", **options), QWEN3_5, print)

    assert available() == TURBOMIND
    assert available(tensor_parallel=2) == TURBOMIND
    assert Options("model", tensor_parallel=2).chosen_backend == PYTORCH, "with DeepStack"
    assert available(tensor_parallel=2, backend="pytorch") == PYTORCH
    with pytest.raises(EngineUnavailable, match="no fp8 key-value cache"):
        available(tensor_parallel=2, cache_type="fp8")


@pytest.mark.parametrize(
    ("asked", "model", "kept"),
    [
        ("float32", "float16", "float32"),
        ("bfloat16", "float16", "float16"),
        ("bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_details_name_the_family_and_the_precision_of_its_state(
    asked: str, model: str, kept: str
) -> None:
    from service.engines.lmdeploy import building

    native = SimpleNamespace(engine_config=SimpleNamespace(dtype=model))
    host: Any = SimpleNamespace(backend=TURBOMIND, native=native, limits_lengths=True)
    config: Any = SimpleNamespace(dtype="bfloat16", family=QWEN3_5, state_dtype=asked)
    found = building.describe(host, Options("model"), config)
    assert (found["family"], found["state_dtype"], found["deepstack"]) == ("Qwen3.5", kept, "none")
    assert "deepstack_mode" not in found


def test_thinking_is_an_option_where_the_family_leaves_it_open() -> None:
    from service.engines.lmdeploy.sampling import honoured

    assert honoured(QWEN3_5) - honoured(QWEN3_VL) == {"thinking"}


def test_the_type_of_the_computation_is_one_that_the_gpu_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from service.engines.lmdeploy import building

    def chosen(capability: tuple[int, int], quantisation: str | None = None, **options: Any) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        config: Any = SimpleNamespace(dtype="bfloat16", quantisation=quantisation)
        return building.with_dtype(Options("model", **options), config).dtype

    assert chosen((7, 5)) == "float16"
    assert chosen((8, 6)) == "bfloat16"
    assert chosen((8, 6), "awq") == "float16"
    assert chosen((9, 0), "awq") == "bfloat16"
    assert chosen((9, 0), model_format="fp8") == "bfloat16"
    with pytest.raises(EngineUnavailable, match="leave dtype at auto"):
        chosen((7, 5), dtype="bfloat16")
