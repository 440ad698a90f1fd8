"""Which tests hold what README guarantees.

A new row of README's table needs an entry here, and every test that is named here has to exist.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HELD = {
    "Every OK answer is complete and valid against your schema.": (
        "tests/service/test_invalid_answers.py::test_an_invalid_answer_is_never_returned",
        "tests/service/test_enforcement.py::test_a_truncated_second_attempt_is_reported_as_truncated",
        "tests/service/http_api/test_chat.py::test_a_cut_answer_under_a_grammar_is_an_error",
        "tests/e2e/test_fuzzed_schemas.py::test_nothing_ends_or_stalls_the_server",
    ),
    "No schema is weakened silently: each keyword is reported as enforced or checked.": (
        "tests/e2e/test_enforcement.py::test_answers_satisfy_enforced_keywords_of_reports",
        "tests/e2e/test_enforcement.py::test_strict_refuses_checked_schemas",
        "tests/service/test_enforcement.py::test_a_result_names_what_is_only_checked",
        "tests/service/test_enforcement.py::test_strict_refuses_what_is_only_checked",
    ),
    "Greedy tokens in float32 are those of transformers.": (
        "tests/service/engines/reference/test_parity.py::test_greedy_tokens_are_transformers_tokens",
        "tests/service/engines/reference/test_parity.py::test_greedy_tokens_of_many_prompts",
        "tests/host_runtime/test_vision.py"
        "::test_greedy_tokens_are_those_of_transformers_and_of_the_reference_engine",
    ),
    "User text cannot forge turns or image placeholders.": (
        "tests/service/engines/common/test_chat_template.py"
        "::test_special_tokens_in_texts_are_ordinary_text",
        "tests/service/engines/common/test_chat_template.py"
        "::test_a_forged_special_token_in_a_tool_call_or_definition_is_text",
    ),
    "Beyond loopback the server needs TLS and API keys or client certificates, or `--insecure`.": (
        "tests/service/test_settings.py::test_beyond_loopback_needs_tls_and_keys",
        "tests/service/test_settings.py::test_http_beyond_loopback_needs_tls_and_keys",
        "tests/service/test_attacks.py::test_without_a_key_the_request_is_not_read",
    ),
}


def guarantees() -> list[str]:
    """The first column of README's table of guarantees."""
    section = (ROOT / "README.md").read_text().split("## Guarantees and limits\n")[1]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", section.split("\n## ")[0], re.M)
    return [row for row in rows if row != "guarantee"]


def names_in(path: str) -> set[str]:
    """Names of the tests in a file."""
    tree = ast.parse((ROOT / path).read_text())
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.name.startswith("test_")
    }


def test_every_guarantee_of_readme_is_held() -> None:
    assert sorted(guarantees()) == sorted(HELD)


@pytest.mark.parametrize("guarantee", HELD)
def test_the_tests_that_hold_a_guarantee_exist(guarantee: str) -> None:
    for name in HELD[guarantee]:
        path, test = name.split("::")
        assert test in names_in(path), name
