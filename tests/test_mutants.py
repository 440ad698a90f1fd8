"""How `make mutants` reads the code: what it leaves alone, which tests it picks, what it calls equivalent.

The tool itself needs Cosmic Ray, which `make mutants` installs.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.mutants.judging import Entry, changed_lines, entries, reason
from tests.mutants.lines import not_run, statement
from tests.mutants.notice import area, nearest_first

ROOT = Path(__file__).parents[1]
SOURCE = """\
import os
from typing import TYPE_CHECKING, Protocol
if TYPE_CHECKING:
    from a import b
LIMIT: int | None = 3
class Shape(Protocol):
    @property
    def size(self) -> int: ...
@cache
def area(side: int | None,
         other: int = 2) -> int | None:
    if side and (
        side > 0
    ):
        return (side
                * other)
    return None
"""


def test_annotations_and_protocols_are_not_run() -> None:
    lines = SOURCE.splitlines()
    found = set()
    for (first, begin), (last, end) in not_run(SOURCE):
        text = "\n".join(lines[first - 1 : last])
        found.add(text if first != last else text[begin:end])
    assert found == {
        "if TYPE_CHECKING:\n    from a import b",
        "int | None",
        "int",
        "    @property\n    def size(self) -> int: ...",
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [(1, [1]), (9, [9, 10, 11]), (11, [9, 10, 11]), (13, [12, 13, 14]), (16, [15, 16]), (17, [17])],
)
def test_the_lines_of_a_statement(line: int, expected: list[int]) -> None:
    assert list(statement(SOURCE, line)) == expected


@pytest.mark.parametrize(
    ("module", "first"),
    [
        ("service/inference/admission.py", "tests/service/inference/test_admission.py"),
        ("service/grpc_api/codec.py", "tests/service/test_codec.py"),
        ("lmdeploy_ext/mrope.py", "tests/lmdeploy_ext/test_mrope.py"),
        (
            "service/schema_compiler/lower/strings.py",
            "tests/service/schema_compiler/test_strings.py",
        ),
    ],
)
def test_the_tests_that_mirror_a_module_come_first(module: str, first: str) -> None:
    near = area(Path(module))
    assert near[0] == first
    assert all((ROOT / file).is_file() for file in near)
    others = ["tests/test_readme.py", f"{first}::test_a", "tests/aa.py"]
    assert nearest_first(others, near)[0] == f"{first}::test_a"


def test_a_module_is_tested_by_whoever_imports_it() -> None:
    assert "tests/service/test_runtime.py" in area(Path("service/lifecycle.py"))


# Equivalent mutants


def test_an_entry_speaks_of_one_change() -> None:
    diff = "--- mutation diff ---\n--- a/x.py\n+++ b/x.py\n@@ -1,2 +1,2 @@\n def f():\n-    return 1\n+    return 2\n"
    was, becomes = changed_lines(diff)
    assert (was, becomes) == ("return 1", "return 2")
    one = Entry("why", "x.py", "return 1", "return 2")
    assert reason([one], "x.py", "NumberReplacer", was, becomes) == "why"
    assert reason([one], "y.py", "NumberReplacer", was, becomes) is None
    assert reason([one], "x.py", "NumberReplacer", was, "return 0") is None
    rule = Entry("rule", was="^return", operator="Number.*")
    assert reason([rule], "z.py", "NumberReplacer", was, becomes) == "rule"
    assert reason([rule], "z.py", "AddNot", was, becomes) is None
    assert reason([rule], "z.py", "NumberReplacer", "x = 1", becomes) is None


def test_the_list_is_up_to_date() -> None:
    """Whoever changes a line drops what was said about its mutants."""
    for one in entries():
        assert len(one.why) > 15
        if one.file is None:
            re.compile(one.was)
            assert one.was or one.operator != ".*"
            continue
        lines = [
            line.strip() for line in (ROOT / one.file).read_text(encoding="utf-8").splitlines()
        ]
        wanted = one.was.splitlines()
        assert any(lines[i : i + len(wanted)] == wanted for i in range(len(lines))), one


def test_what_is_not_mutated_is_there() -> None:
    tree = ast.parse((ROOT / "tests" / "mutants" / "__main__.py").read_text(encoding="utf-8"))
    (excluded,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXCLUDED"
    )
    assert [path for path in excluded if not (ROOT / path).exists()] == []
