"""What the GPU tests share. Without a GPU every one of them is skipped, with the reason.

What they measure goes into ``benchmarks/results/deepstack_gpu.json`` at the end of a run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.service.engines.conformance")
LIMIT_S = 3600
"""Of one test: checkpoints of billions of parameters are written, loaded several times, and read by the processor."""
Rows = list[dict[str, str]]
_ROWS = pytest.StashKey[Rows]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here, reason = Path(__file__).parent, _reason()
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.timeout(LIMIT_S))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _reason() -> str:
    """Why they cannot run here."""
    import torch

    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU; torch sees none"
    if "PYTEST_XDIST_WORKER" in os.environ:  # they fill its memory, and take times
        return "needs the GPU for itself: make test-gpu"
    return ""


@pytest.fixture(scope="module", autouse=True)
def every_core() -> Iterator[None]:
    """transformers reads models of billions of parameters on the processor, and nothing runs beside it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str, str, str], None]:
    """Notes what was measured, its value, and what was wanted."""
    rows = request.config.stash.setdefault(_ROWS, [])

    def note(what: str, value: str, wanted: str) -> None:
        rows.append({"what": what, "measured": value, "wanted": wanted})

    return note


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash.get(_ROWS, [])
    if rows:
        import torch

        from benchmarks.common import markdown, write_results

        terminalreporter.section("measured on the GPU")
        terminalreporter.write_line(markdown(rows))
        path = write_results("deepstack_gpu", rows, f"On one {torch.cuda.get_device_name(0)}.")
        terminalreporter.write_line(f"written to {path}")


@pytest.fixture(scope="session")
def two_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the shape of Qwen3-VL-2B with random weights that decide clearly."""
    from benchmarks.random_model import write_random_model
    from service.wiring import BUNDLED_MODEL

    return write_random_model(tmp_path_factory.mktemp("two-billion"), BUNDLED_MODEL)


@pytest.fixture(scope="session")
def eight_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the widths of Qwen3-VL-8B, with fewer layers: the processor reads it, too."""
    from benchmarks.random_model import write_random_model
    from service.wiring import BUNDLED_MODEL

    folder = tmp_path_factory.mktemp("eight-billion")
    return write_random_model(folder, BUNDLED_MODEL, layers=8, size="8B")


@pytest.fixture
def worker(tmp_path: Path, measured: Callable[[str, str, str], None]) -> Iterator[Any]:
    """What the checks of `benchmarks.gpu_kit` note their findings in."""
    from benchmarks.gpu_kit.context import Context
    from benchmarks.gpu_kit.worker import Worker

    noting = Worker(Context(tmp_path, tmp_path, dry=False), "alone")
    yield noting
    for one in noting.checks:
        measured(one["what"], str(one["measured"]), one["wanted"])
