"""The main job in one command: start the server on the bundled model, analyse a drawing, run a schema task, stop.

Every step is a command that you can type yourself; the script prints each one before it runs it.
"""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
DRAWING = HERE / "drawings" / "samples" / "night-desert.png"
SCHEMA = HERE / "schemas" / "objects.json"
PROMPT = "List every object with its position, shape, color and size."
START_LIMIT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shown(*words: str) -> str:
    """The command as one would type it, with paths relative to where the user stands."""
    cwd = f"{Path.cwd()}/"
    return "$ qwen3vl " + " ".join(shlex.quote(word.replace(cwd, "")) for word in words)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "service", *words]


def step(*words: str) -> None:
    print(f"\n{shown(*words)}", flush=True)
    subprocess.run(command(*words), check=True)


def wait_until_serving(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        health = subprocess.run(command("health", "--server", address), capture_output=True)
        if health.returncode == 0:
            return
        time.sleep(0.3)
    raise SystemExit(f"The server did not start. Its log:\n{log.read_text()}")


def main() -> None:
    address = f"127.0.0.1:{free_port()}"
    port = address.rpartition(":")[2]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        print(shown("serve", "--port", port), flush=True)
        started = time.monotonic()
        with log.open("wb") as out:
            server = subprocess.Popen(command("serve", "--port", port), stdout=out, stderr=out)
        try:
            wait_until_serving(server, address, log)
            print(f"SERVING on {address} after {time.monotonic() - started:.1f} s")
            step("analyze", "--server", address, str(DRAWING))
            step(
                "run",
                "--server",
                address,
                "--schema",
                str(SCHEMA),
                "--prompt",
                PROMPT,
                str(DRAWING),
            )
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(timeout=30)
    print(f"\nServer stopped, exit code {code}.")
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
