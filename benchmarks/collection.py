"""A collection of JSON schemas with instances, which is not part of the project."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMAS_VARIABLE = "BENCHMARK_SCHEMAS"
"""Environment variable with the file, for ``python -m benchmarks --schemas FILE``."""
DEFAULT = Path(__file__).parents[2] / "shared" / "maskbench" / "public.jsonl"


@dataclass(frozen=True)
class Case:
    """A schema and instances, each with whether it is valid: ``{"valid": …, "data": …}``."""

    name: str
    schema: Any
    tests: list[dict[str, Any]]


def collection_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--schemas``."""
    parser.add_argument(
        "--schemas",
        type=Path,
        metavar="FILE.jsonl",
        default=Path(os.environ.get(SCHEMAS_VARIABLE) or DEFAULT),
        help="one object with name, schema and tests a line",
    )


def read_collection(path: Path) -> list[Case] | None:
    """The cases of a file; None, and a line that says why, where there is no file."""
    if not path.is_file():
        print(f"Left out: there is no collection of schemas at {path}; name one with --schemas.")
        return None
    with path.open() as lines:
        found = [json.loads(line) for line in lines if line.strip()]
    return [Case(one["name"], one["schema"], one.get("tests", [])) for one in found]
