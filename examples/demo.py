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
START_LIMIT_S = 180
STOP_LIMIT_S = 60


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
    code = subprocess.run(command(*words)).returncode
    if code:
        raise SystemExit(code)


def wait_until_serving(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    words = command("health", "--server", address, "--wait", str(START_LIMIT_S))
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as health:
        while health.poll() is None and server.poll() is None:
            time.sleep(0.05)
        health.terminate()
    if health.returncode != 0:
        raise SystemExit(f"The server did not start. Its log:\n{log.read_text()}")


def stopped(server: subprocess.Popen[bytes]) -> int:
    """Exit code of the server; it is killed where it does not end by itself."""
    try:
        return server.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


def main() -> None:
    port = str(free_port())
    address = f"127.0.0.1:{port}"
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
            call = ("run", "--server", address, "--schema", str(SCHEMA), "--prompt", PROMPT)
            step(*call, str(DRAWING))
        finally:
            server.send_signal(signal.SIGTERM)
            code = stopped(server)
    print(f"\nServer stopped, exit code {code}.")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
