"""What every process of the kit knows of a run, and where it keeps what."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from benchmarks.gpu_kit.plan import DRY, FULL, Sizes

ROOT = Path(__file__).parents[2]
CODE = (
    "service", "lmdeploy_ext", "examples/drawings", "benchmarks/gpu_kit",
    "benchmarks/random_model.py", "tests/checkpoints.py", "tests/host_runtime", "tests/service/engines",
)  # fmt: skip
"""What the results depend on."""


@dataclass(frozen=True)
class Context:
    """A run of the kit.

    work: for what can be made again. results: the folder of this run's results. dry: on the host
    runtime, in tiny sizes.
    """

    work: Path
    results: Path
    dry: bool

    @property
    def sizes(self) -> Sizes:
        return DRY if self.dry else FULL

    @property
    def device(self) -> str:
        """Where transformers computes."""
        return "cpu" if self.dry else "cuda"

    @cached_property
    def made(self) -> Path:
        """The folder for what `prepare` makes."""
        return self.work / f"made-{'dry' if self.dry else 'full'}-{code_version()}"

    def model(self, name: str) -> Path:
        """A checkpoint folder."""
        from service.wiring import BUNDLED_MODEL

        return BUNDLED_MODEL if name == "bundled" else self.made / name

    def image(self, number: int) -> Path:
        return self.made / "images" / f"{number:05}.jpg"

    def done(self, name: str) -> Path:
        """Exists once `prepare` has made something."""
        return self.made / f"{name}.done"

    def result(self, step: str) -> Path:
        return self.results / f"{step}.json"

    def figures(self, step: str) -> dict[str, Any]:
        """What an earlier step found; nothing where it has not run."""
        content = read(self.result(step))
        return dict(content.get("figures", {})) if content else {}

    def to_json(self) -> str:
        return json.dumps([str(self.work), str(self.results), self.dry])

    @staticmethod
    def from_json(text: str) -> Context:
        work, results, dry = json.loads(text)
        return Context(Path(work), Path(results), dry)

    def at(self, results: Path) -> Context:
        return replace(self, results=results)


def read(path: Path) -> dict[str, Any] | None:
    """A JSON file; None where there is none, or only a part of one."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found


def write(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n")
    partial.replace(path)


@lru_cache
def code_version() -> str:
    """A hash of the code that the results depend on."""
    digest = hashlib.sha256()
    for name in CODE:
        top = ROOT / name
        paths = [top] if top.is_file() else sorted(top.rglob("*"))
        for path in paths:
            if path.suffix in (".py", ".c", ".cpp", ".h", ".json", ".safetensors"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
