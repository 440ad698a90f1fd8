"""The types in which TurboMind computes on each generation of GPUs."""

from __future__ import annotations

import logging

import pytest

from service.engines.lmdeploy.generations import FORMATS, GENERATIONS, PLAIN, choose_dtype
from service.errors import EngineUnavailable

T4, A10, H100 = ("Tesla T4", (7, 5)), ("NVIDIA A10", (8, 6)), ("NVIDIA H100", (9, 0))


def test_old_gpus_compute_a_bfloat16_checkpoint_in_float16(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_dtype("auto", "bfloat16", "hf", *T4) == "float16"
    assert "the checkpoint is in bfloat16, but on Tesla T4 (compute capability 7.5)" in caplog.text
    caplog.clear()
    assert choose_dtype("auto", "bfloat16", "hf", *A10) == "bfloat16"
    assert choose_dtype("auto", "float16", "hf", *A10) == "float16"
    assert choose_dtype("float16", "bfloat16", "hf", *A10) == "float16"
    assert not caplog.text


@pytest.mark.parametrize(
    ("asked", "model_format", "gpu", "says"),
    [
        ("bfloat16", "hf", T4, "on Tesla T4 (compute capability 7.5) TurboMind computes in float16;"),
        ("bfloat16", "awq", A10, "weights in 4 bits: on NVIDIA A10 (compute capability 8.6) TurboM"),
        ("float16", "fp8", H100, "weights in FP8: on NVIDIA H100 (compute capability 9.0) TurboMind"),
        ("auto", "hf", ("GTX 1080", (6, 1)), "TurboMind does not run on GTX 1080 (compute capabilit"),
    ],
)  # fmt: skip
def test_a_type_that_lmdeploy_would_silently_change_is_refused(
    asked: str, model_format: str, gpu: tuple[str, tuple[int, int]], says: str
) -> None:
    with pytest.raises(EngineUnavailable) as raised:
        choose_dtype(asked, "bfloat16", model_format, *gpu)
    assert says in raised.value.message


def test_what_the_table_does_not_have_is_left_to_lmdeploy() -> None:
    assert choose_dtype("auto", "bfloat16", "hf", "a newer GPU", (13, 0)) == "auto"
    assert choose_dtype("float16", "bfloat16", "mxfp4", *H100) == "float16"


def _dtypes() -> dict[str, list[str]]:
    from lmdeploy.turbomind.converter import (
        _DEFAULT_GROUP_SIZES,
        _build_quantized_formats,
        _get_executable_dtypes,
    )

    found = {}
    for name in FORMATS:
        formats = _build_quantized_formats(name, _DEFAULT_GROUP_SIZES.get(name))
        found[name] = sorted(_get_executable_dtypes(formats, 0))
    return found


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize(
    "capability", [one for generation in GENERATIONS for one in generation.capabilities]
)
def test_the_table_says_what_the_installed_lmdeploy_says(capability: tuple[int, int]) -> None:
    from tests.host_runtime.runner import run

    variables = {"HOST_RUNTIME_CAPABILITY": "{}{}".format(*capability)}
    found = run(_dtypes, mode="null", extra=variables)
    dtypes = next(one.dtypes for one in GENERATIONS if capability in one.capabilities)
    assert found == {name: sorted(dtypes[kind]) for name, kind in FORMATS.items()}


def test_every_generation_has_every_kind_of_weights() -> None:
    for generation in GENERATIONS:
        assert set(generation.dtypes) == set(FORMATS.values())
        assert generation.dtypes[PLAIN]
