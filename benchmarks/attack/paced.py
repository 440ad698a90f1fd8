"""Runs a server on the fake engine with a set pace: seconds before each piece of text, pieces of an answer.

Settings come from the environment, as for ``qwen3vl serve``; with a port for HTTP, it serves that, too.
"""

from __future__ import annotations

import asyncio
import sys

from service import logs
from service.cli.front_ends import build_front_ends
from service.engines.fake import FakeEngine
from service.runtime import Runtime, serve
from service.settings import load_settings
from service.tasks.registry import load_registry


def main() -> None:
    delay_s, pieces = (float(argument) for argument in sys.argv[1:])
    logs.configure()
    engine = FakeEngine("word " * int(pieces), token_delay_s=delay_s)
    runtime = Runtime(load_settings(), [engine], load_registry(None))
    asyncio.run(serve(runtime, build_front_ends(runtime)))


if __name__ == "__main__":
    main()
