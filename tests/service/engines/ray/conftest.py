from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from service.engines.ray.cluster import CONNECTION
from service.errors import EngineUnavailable
from tests.service.engines.ray.clusters import CLUSTER


def _leave_silently() -> None:
    """A start of Ray that fails leaves objects of its processes, which Ray ends when this process ends.
    They would warn when they are freed, in whichever test that happens."""
    from ray._private.services import ConsolePopen

    ConsolePopen.__del__ = lambda self: None


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Ray on this machine, started once for all tests of this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, at its import and start
        try:
            CONNECTION.open(CLUSTER)
        except EngineUnavailable:  # Ray gives its second process 30 s, even on a busy machine
            CONNECTION.open(CLUSTER)
        _leave_silently()
    yield
    CONNECTION.close()
