"""``qwen3vl`` and ``python -m service``."""

from __future__ import annotations

from service.cli.app import app


def main() -> None:
    app(prog_name="qwen3vl")


if __name__ == "__main__":
    main()
