"""Run the programs of examples/ as a user does: with commands in a shell."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path


async def shell(
    command: str, folder: Path, limit_s: float = 120, **environment: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `python` is this one
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-c",
        command,
        cwd=folder,
        env={**os.environ, "PATH": tools, "PYTHONWARNINGS": "error", **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), limit_s)
    return process.returncode or 0, out.decode(), err.decode()
