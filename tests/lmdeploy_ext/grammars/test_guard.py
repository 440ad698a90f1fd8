"""The replacements of `lmdeploy_ext.grammars.guard` by themselves; LMDeploy as a whole has other tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.host_runtime.runner import run

pytestmark = [pytest.mark.slow, pytest.mark.host]  # imports lmdeploy in processes of their own


class Owner:
    """Stands for an engine or a compiler."""


FORMAT = {"type": "regex_schema", "regex_schema": "a"}


# In the child


def _kept() -> dict[str, Any]:
    from lmdeploy_ext.grammars import guard

    guard.KEPT = 2
    kept, first, second = guard.Kept(), Owner(), Owner()
    found: dict[str, Any] = {"nothing": kept.find(first, FORMAT)}
    kept.put(first, FORMAT, 1)
    kept.put(second, FORMAT, 2)
    found["both"] = [kept.find(first, FORMAT), kept.find(second, FORMAT)]
    found["other format"] = kept.find(first, {**FORMAT, "regex_schema": "b"})
    kept.find(first, FORMAT)
    kept.put(first, {"type": "json_object"}, 3)
    found["the oldest is gone"] = [kept.find(first, FORMAT), kept.find(second, FORMAT)]
    kept.put(first, {"type": object}, 4)
    found["not JSON"] = kept.find(first, {"type": bytes})
    (key,) = [one for one in kept._known if "regex" in one[1]]
    del first
    kept._known[id(second), key[1]] = kept._known[key]  # as if the id were used again
    found["dead object"] = kept.find(second, FORMAT)
    return found


def _compiling() -> dict[str, Any]:
    from lmdeploy_ext.grammars import guard

    made: list[str] = []

    def make(compiler: Any, response_format: Any) -> str:
        made.append(response_format["regex_schema"])
        if response_format["regex_schema"] == "bad":
            raise KeyError("bad")
        return "compiled"

    replacement, owner = guard.compile_for_turbomind(make), Owner()
    found: dict[str, Any] = {"result": [replacement(owner, FORMAT), replacement(owner, FORMAT)]}
    try:
        replacement(owner, {**FORMAT, "regex_schema": "bad"})
    except Exception as error:
        # LMDeploy goes on without the grammar after these errors
        found["dropped"] = isinstance(error, ValueError | KeyError)
        found["error"] = f"{type(error).__name__}: {error}"
    return {**found, "made": made}


def _unavailable() -> list[Any]:
    from lmdeploy.serve.core.exceptions import RequestError

    from lmdeploy_ext.grammars import guard, trials

    trials._COMMAND = ("/bin/false",)
    try:
        guard.check(Owner(), FORMAT)
    except RequestError as error:
        return [error.status_code, error.message]
    return []


def _text() -> list[Any]:
    from lmdeploy_ext.grammars import guard, trials

    trials._COMMAND = ("/bin/false",)
    return [guard.check(Owner(), {"type": "text"})]


# Tests


def test_results_are_kept_for_their_object() -> None:
    assert run(_kept, mode="driver") == {
        "nothing": None,
        "both": [1, 2],
        "other format": None,
        "the oldest is gone": [1, None],
        "not JSON": None,
        "dead object": None,
    }


def test_lmdeploy_never_goes_on_without_a_grammar() -> None:
    found = run(_compiling, mode="driver")
    assert found["result"] == ["compiled", "compiled"]
    assert found["made"] == ["a", "bad"]
    assert found["dropped"] is False
    assert found["error"].startswith("RequestError: GRAMMAR_INVALID: response_format cannot be")


def test_a_grammar_that_cannot_be_checked_is_not_accepted() -> None:
    status, message = run(_unavailable, mode="driver")
    assert status == 503
    assert message == "Grammars cannot be checked now; try again later."


def test_text_needs_no_check() -> None:
    assert run(_text, mode="driver") == [None]
