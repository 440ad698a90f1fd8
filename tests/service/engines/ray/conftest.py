from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest

from service.engines.ray.cluster import CONNECTION
from service.errors import EngineUnavailable
from tests.service.engines.ray.clusters import CLUSTER


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Ray on this machine, started once for all tests of this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, at its import and start
        try:
            CONNECTION.open(CLUSTER)
        except EngineUnavailable:  # Ray gives itself 30 s to start, whatever else the machine does
            CONNECTION.open(CLUSTER)
        gc.collect()  # a failed start leaves objects of processes, which warn when they are freed
    yield
    CONNECTION.close()
