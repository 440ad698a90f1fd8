"""What the GPU tests share. Without a GPU every one of them is skipped, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.service.engines.conformance")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    here = Path(__file__).parent
    usable = torch.cuda.is_available()
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.slow)
        if not usable:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch sees none"))


@pytest.fixture(scope="session")
def two_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the shape of Qwen3-VL-2B with random weights that decide clearly."""
    from benchmarks.random_model import write_random_model
    from service.wiring import BUNDLED_MODEL
    from tests.host_runtime.checkpoints import clarify

    folder = tmp_path_factory.mktemp("two-billion")
    write_random_model(folder, BUNDLED_MODEL, layers=28)
    clarify(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def eight_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the widths of Qwen3-VL-8B, with fewer layers: it fits one file, as `clarify` wants."""
    from benchmarks.random_model import write_random_model
    from service.wiring import BUNDLED_MODEL
    from tests.host_runtime.checkpoints import clarify

    folder = tmp_path_factory.mktemp("eight-billion")
    write_random_model(folder, BUNDLED_MODEL, layers=8, size="8B")
    clarify(folder, seed=0)
    return folder
