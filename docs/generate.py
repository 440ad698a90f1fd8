"""Writes the parts of docs/ that come from the code: ``python -m docs.generate [--check]``."""

from __future__ import annotations

import sys
from pathlib import Path

from service.error_table import REASONS

PAGE = Path(__file__).parent / "errors.md"
BEGIN, END = "<!-- reasons:begin -->\n", "<!-- reasons:end -->\n"


def error_table() -> str:
    """The table of errors as Markdown."""
    lines = ["| reason | gRPC status | HTTP | retry | when |", "|---|---|---|---|---|"]
    for row in REASONS.values():
        retry = "yes" if row.retry else "no"
        lines.append(f"| `{row.name}` | {row.grpc} | {row.http} | {retry} | {row.meaning} |")
    return "".join(f"{line}\n" for line in lines)


def errors_page() -> str:
    """docs/errors.md with the table of today."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + error_table() + END + after


def main() -> int:
    """Write the page, or say whether it is up to date."""
    page = errors_page()
    if "--check" in sys.argv[1:]:
        if page != PAGE.read_text(encoding="utf-8"):
            print("docs/errors.md is not what service/error_table.py says: run `make docs`")
            return 1
        return 0
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
