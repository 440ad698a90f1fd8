"""``qwen3vl`` and ``python -m service``."""

from __future__ import annotations

import os
import sys

from service.cli.app import app
from service.cli.output import any_encoding
from service.logs import trace_crashes


def main() -> None:
    trace_crashes()
    # gRPC's own log tells what our errors tell, in the words of its source files.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    any_encoding(sys.stdout)
    app(prog_name="qwen3vl")


if __name__ == "__main__":
    main()
