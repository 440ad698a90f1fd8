"""Updates the generated parts of the pages: ``python -m docs.generate [--check]``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from docs import measured
from lmdeploy_ext.families import FAMILIES, ModelFamily
from service.engines.lmdeploy.generations import FORMATS, GENERATIONS, version
from service.error_table import REASONS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
BEGIN, END = "<!-- reasons:begin -->\n", "<!-- reasons:end -->\n"
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
DIRECTIONS_BEGIN, DIRECTIONS_END = "<!-- directions:begin -->\n", "<!-- directions:end -->\n"

GPU = ROOT / "docs" / "gpu.md"
FAMILIES_BEGIN, FAMILIES_END = "<!-- families:begin -->\n", "<!-- families:end -->\n"
GPUS_BEGIN, GPUS_END = "<!-- gpus:begin -->\n", "<!-- gpus:end -->\n"
SCHEMAS = ROOT / "docs" / "schemas.md"
MEASURED_BEGIN, MEASURED_END = "<!-- measured:begin -->\n", "<!-- measured:end -->\n"
MODALITIES = "text, images"
"""What every model of a family takes; the text-only mode leaves images out."""


def error_table() -> str:
    """The table of errors as Markdown."""
    lines = ["| reason | gRPC status | HTTP | retry | when |", "|---|---|---|---|---|"]
    for row in REASONS.values():
        retry = "yes" if row.retry else "no"
        lines.append(f"| `{row.name}` | {row.grpc} | {row.http} | {retry} | {row.meaning} |")
    return "".join(f"{line}\n" for line in lines)


def directions_table(allowed: Mapping[str, set[str]]) -> str:
    """The import directions of the service as Markdown.

    allowed: module or package in ``service/`` -> the parts of the service that it may import.
    """
    lines = ["| part of `service/` | imports |", "|---|---|"]
    for unit, others in allowed.items():
        named = ", ".join(f"`{other}`" for other in sorted(others)) or "nothing of the service"
        lines.append(f"| `{unit}` | {named} |")
    return "".join(f"{line}\n" for line in lines)


def families_table() -> str:
    """The model families, and on which engine each runs with which modalities, as Markdown."""
    lines = [
        "| family | architectures | `reference` | `lmdeploy`, TurboMind | `lmdeploy`, PyTorch engine |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        names = ", ".join(f"`{name}`" for name in family.architectures)
        reference = "refused" if family.recurrent else MODALITIES
        lines.append(
            f"| {family.name} | {names} | {reference} | {_on_turbomind(family)} | {MODALITIES} |"
        )
    return "".join(f"{line}\n" for line in lines)


def _on_turbomind(family: ModelFamily) -> str:
    by = "with `lmdeploy_ext`" if family.extension else "stock"
    return f"{MODALITIES}; {by}{', images on one GPU only' if family.deepstack else ''}"


def gpus_table() -> str:
    """The types in which TurboMind computes on each generation of GPUs, as Markdown."""
    kinds = list(dict.fromkeys(FORMATS.values()))
    lines = [
        f"| generation | GPUs | compute capability | {' | '.join(f'weights in {one}' for one in kinds)} |",
        "|---|---|---|" + "---|" * len(kinds),
    ]
    for one in GENERATIONS:
        cells = [", ".join(one.dtypes[kind]) for kind in kinds]
        numbers = ", ".join(version(capability) for capability in one.capabilities)
        lines.append(f"| {one.name} | {one.gpus} | {numbers} | {' | '.join(cells)} |")
    return "".join(f"{line}\n" for line in lines)


def gpu_page() -> str:
    """docs/gpu.md with the current tables of families and GPUs."""
    page = _replaced(
        GPU.read_text(encoding="utf-8"), FAMILIES_BEGIN, families_table(), FAMILIES_END
    )
    return _replaced(page, GPUS_BEGIN, gpus_table(), GPUS_END)


def schemas_page() -> str:
    """docs/schemas.md with the measurements that are stored."""
    page = SCHEMAS.read_text(encoding="utf-8")
    return _replaced(page, MEASURED_BEGIN, measured.stored(), MEASURED_END)


def errors_page() -> str:
    """docs/errors.md with the current table."""
    return _replaced(PAGE.read_text(encoding="utf-8"), BEGIN, error_table(), END)


def architecture_page(allowed: Mapping[str, set[str]]) -> str:
    """ARCHITECTURE.md with the current import directions. allowed: see ``directions_table``."""
    table = directions_table(allowed)
    page = ARCHITECTURE.read_text(encoding="utf-8")
    return _replaced(page, DIRECTIONS_BEGIN, table, DIRECTIONS_END)


def _replaced(page: str, begin: str, text: str, end: str) -> str:
    """The page with a new text between two markers."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + text + end + after


def main() -> int:
    """Write the pages, or check whether they are up to date."""
    from tests.test_boundaries import ALLOWED

    pages = {
        PAGE: (errors_page(), "service/error_table.py"),
        GPU: (gpu_page(), "lmdeploy_ext/families.py, service/engines/lmdeploy/generations.py"),
        SCHEMAS: (schemas_page(), "benchmarks/results"),
        ARCHITECTURE: (architecture_page(ALLOWED), "tests/test_boundaries.py"),
    }
    if "--check" in sys.argv[1:]:
        stale = {
            page: source
            for page, (text, source) in pages.items()
            if text != page.read_text(encoding="utf-8")
        }
        for page, source in stale.items():
            print(f"{page.relative_to(ROOT)} is not what {source} says: run `make docs`")
        return 1 if stale else 0
    for page, (text, _) in pages.items():
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
