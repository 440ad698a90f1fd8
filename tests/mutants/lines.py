"""Lines of source: which of them no code runs, and which belong together."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

Position = tuple[int, int]
"""A line, from 1, and a column, from 0."""


def not_run(source: str) -> Iterator[tuple[Position, Position]]:
    """Begin and end of what only type checkers read: annotations, protocols and imports for them."""
    for node in ast.walk(ast.parse(source)):
        found: list[ast.AST | None] = []
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            found = [node.annotation]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found = [node.returns]
        elif isinstance(node, ast.ClassDef):
            protocol = any(ast.unparse(base).startswith("Protocol") for base in node.bases)
            found = list(node.body) if protocol else []
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            found = [node]
        for one in found:
            if one is not None:
                at: Any = one
                begin = min(
                    [at.lineno, *(mark.lineno for mark in getattr(at, "decorator_list", ()))]
                )
                column = 0 if begin < at.lineno else at.col_offset
                yield (begin, column), (at.end_lineno, at.end_col_offset)


def statement(source: str, line: int) -> range:
    """The lines of the statement at a line; of one with a body those before the body."""
    found = range(line, line + 1)
    for node in ast.walk(ast.parse(source)):  # the innermost comes last
        if isinstance(node, (ast.stmt, ast.ExceptHandler)):
            marks = getattr(node, "decorator_list", ())
            begin = min([node.lineno, *(mark.lineno for mark in marks)])
            body = getattr(node, "body", None)
            end = max(begin, (body[0].lineno - 1 if body else node.end_lineno) or begin)
            if begin <= line <= end:
                found = range(begin, end + 1)
    return found
