"""docs/gpu.md: its commands are valid settings, its numbers follow from its formula."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from service.cli.arguments import flag_of, read_settings
from service.engines.lmdeploy.options import LMDeploySettings
from service.engines.reference.options import ReferenceSettings
from service.settings import Settings
from service.wiring import build_engine

ONLY_PROSE = {"backend", "deepstack", *ReferenceSettings.model_fields}
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "gpu.md").read_text()
HEAD = 128
KIB = 1024


def rows(heading: str) -> list[list[str]]:
    """Cells of the tables under a heading, without their first two lines."""
    (section,) = re.findall(rf"^###? {heading}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


MODELS = {cells[0]: cells for cells in rows("Memory")}
RECIPES = rows("Recipes")


def flags(text: str) -> list[str]:
    return shlex.split(" ".join(re.findall(r"`([^`]+)`", text)))


@pytest.mark.parametrize("cells", RECIPES, ids=lambda cells: " ".join(cells[:2]))
def test_a_recipe_is_valid(cells: list[str]) -> None:
    settings = read_settings("serve", ["--engine", "lmdeploy", "--model", "a/b", *flags(cells[4])])
    assert settings is not None
    own: Any = settings.engine_settings
    assert own.context_length is not None
    assert own.tensor_parallel == int(cells[1].split(" × ")[0])
    build_engine(settings)


@pytest.mark.parametrize("cells", RECIPES, ids=lambda cells: " ".join(cells[:2]))
def test_the_tokens_of_a_recipe_follow_from_the_formula(cells: list[str]) -> None:
    name, _, kind = cells[0].partition(" ")
    gpus, size_gb = (float(one) for one in re.findall(r"[\d.]+", cells[1]))
    _, bf16, fp8, layers, heads, _ = MODELS[name]
    weights_gb = float((fp8 if kind == "FP8" else bf16).split()[0]) / gpus
    assert float(cells[2].split()[0]) == pytest.approx(weights_gb, abs=0.06)
    settings = read_settings("serve", ["--engine", "lmdeploy", "--model", "a/b", *flags(cells[4])])
    assert settings is not None
    reserve_gb = 4 if name.startswith("235B") else 3
    own: Any = settings.engine_settings
    value_bytes = {"none": 2, "int8": 1}[own.cache_type]
    token_bytes = int(layers) * 2 * max(1, int(heads) / gpus) * HEAD * value_bytes
    free_bytes = own.cache_share * (size_gb - weights_gb - reserve_gb) * 1e9
    tokens = int(cells[3].replace(",", ""))
    assert tokens == pytest.approx(free_bytes / token_bytes, rel=0.01)
    assert tokens >= own.context_length, "one request of the full context fits"


def test_the_bytes_of_a_token() -> None:
    for cells in MODELS.values():
        layers, heads, kib = (int(one) for one in cells[3:])
        assert kib * KIB == layers * 2 * heads * HEAD * 2


def test_every_setting_of_the_engine_is_explained() -> None:
    explained = {flag for cells in rows("Settings") for flag in flags(cells[0])}
    mine = {flag_of(name) for name in LMDeploySettings.model_fields.keys() - ONLY_PROSE}
    assert mine <= explained
    known = {flag_of(name) for name in Settings.model_fields}
    used = set(re.findall(r"--(?:no-)?[a-z]+(?:-[a-z]+)*", PAGE))
    of_the_kit = {"--again", "--steps", "--dry-run", "--python", "--out"}
    foreign = {"--gpus", "--help"} | of_the_kit
    assert {flag.replace("--no-", "--") for flag in used} - foreign <= known


def test_defaults_on_the_page_are_those_of_the_settings() -> None:
    stated = {flags(cells[0])[0]: cells[1] for cells in rows("Settings")}
    fields = {**Settings.model_fields, **LMDeploySettings.model_fields}
    assert str(fields["cache_share"].default) in stated["--cache-share"]
    assert str(fields["prefill_chunk"].default) in stated["--prefill-chunk"]
    assert str(fields["max_images"].default) in stated["--max-images"]
    assert str(fields["max_batch"].default) in stated["--max-batch"]


def test_the_steps_of_the_kit_are_those_of_its_plan() -> None:
    from benchmarks.gpu_kit.plan import STEPS, planned_s

    assert rows("The steps") == [
        [f"`{step.name}`", step.part, f"{step.limit_s:g}", step.checks] for step in STEPS
    ]
    assert f"are {planned_s():g} s together" in PAGE


def test_the_tables_of_families_and_gpus_are_those_of_the_records() -> None:
    from docs.generate import gpu_page

    assert gpu_page() == PAGE, "run `make docs`"
    assert "| Qwen3.5 |" in PAGE
    assert "| Turing | T4, RTX 20 | 7.5 | float16 |" in PAGE
