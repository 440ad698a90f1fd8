"""Settings of all tests."""

import dataclasses
import os
import signal
from typing import Any

import pytest
from hypothesis import is_hypothesis_test, settings

from tests.ports import free_port

# Tests run on every core at once: a process that takes them all for its matrix products slows the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Time says nothing about right or wrong, and a busy machine must not fail a test. Every run tries the same
# examples, so that a change fails for what it changed; the search for new ones is `make test-slow`.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# A script's background job starts with SIGINT ignored, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def unused_tcp_port() -> int:
    """In place of the fixture of pytest-asyncio, whose port an outgoing connection may get."""
    return free_port()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--examples-times",
        type=int,
        default=1,
        metavar="N",
        help="property tests try N times as many examples as they say, new ones in every run",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    times = config.getoption("--examples-times")
    if times == 1:
        return
    functions = {item.function for item in items if isinstance(item, pytest.Function)}
    for function in filter(is_hypothesis_test, functions):
        multiply_examples(function, times)


def multiply_examples(function: Any, times: int) -> None:
    """Have a property test try more and new examples, also where it says how many it tries.

    A profile of Hypothesis does not reach such tests, and there is no public way to change what
    they say. Its own pytest plugin reads the same attribute.
    """
    said = function._hypothesis_internal_use_settings
    function._hypothesis_internal_use_settings = settings(
        said,
        max_examples=times * said.max_examples,
        derandomize=False,
        print_blob=True,
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of several hands what it counted to the one that prints."""
    from tests.host_runtime import parity

    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["parity"] = {name: dataclasses.asdict(one) for name, one in parity.TALLIES.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes what ``pytest_sessionfinish`` of such a process left."""
    from tests.host_runtime import parity

    counted = getattr(node, "workeroutput", {}).get("parity", {})
    parity.TALLIES.update({name: parity.Tally(**one) for name, one in counted.items()})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many requests were held to transformers, and where a tie decided."""
    from tests.host_runtime import parity

    if parity.TALLIES:
        terminalreporter.section("parity with transformers")
        for line in parity.report(parity.TALLIES):
            terminalreporter.write_line(line)
