"""The main job in one command: serve the bundled model, analyse a drawing, run a schema task, ask over HTTP, stop.

Every step is a command that you can type yourself; the script prints each one before it runs it. The
call over HTTP is what an OpenAI SDK sends. At the end it prints how to open the playground, which it has
requested from its own server.
"""

from __future__ import annotations

import base64
import json
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DRAWING = HERE / "drawings" / "samples" / "night-desert.png"
SCHEMA = HERE / "schemas" / "objects.json"
PROMPT = "List every object with its position, shape, color and size."
PLAYGROUND = "/playground"
SERVE_HTTP = ("serve", "--http-port", "8000")
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


def direct() -> urllib.request.OpenerDirector:
    """Opens URLs without the proxy of the environment."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def check_playground(base: str) -> None:
    """Request the playground. Raises ``urllib.error.HTTPError`` if it is not served."""
    with direct().open(base + PLAYGROUND, timeout=60) as response:
        response.read()


def ask_over_http(base: str) -> None:
    """Ask for the objects of the drawing as an OpenAI SDK does, and print the answer."""

    def sent(path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(base + path, data, {"content-type": "application/json"})
        with direct().open(request, timeout=60) as response:
            return json.load(response)

    image = base64.b64encode(DRAWING.read_bytes()).decode()
    schema = {"name": "objects", "schema": json.loads(SCHEMA.read_text())}
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": PROMPT},
    ]
    body = {
        "model": sent("/v1/models")["data"][0]["id"],
        "messages": [{"role": "user", "content": content}],
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    print(f"\nPOST {base}/v1/chat/completions", flush=True)
    text = sent("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    print(f"  {json.dumps(json.loads(text))}", flush=True)


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
    port, http_port = str(free_port()), str(free_port())
    address = f"127.0.0.1:{port}"
    serve = ("serve", "--port", port, "--http-port", http_port)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        print(shown(*serve), flush=True)
        started = time.monotonic()
        with log.open("wb") as out:
            server = subprocess.Popen(command(*serve), stdout=out, stderr=out)
        try:
            wait_until_serving(server, address, log)
            print(f"SERVING on {address} after {time.monotonic() - started:.1f} s")
            step("analyze", "--server", address, str(DRAWING))
            call = ("run", "--server", address, "--schema", str(SCHEMA), "--prompt", PROMPT)
            step(*call, str(DRAWING))
            ask_over_http(f"http://127.0.0.1:{http_port}")
            check_playground(f"http://127.0.0.1:{http_port}")
        finally:
            server.send_signal(signal.SIGTERM)
            code = stopped(server)
    print(f"\nServer stopped, exit code {code}.")
    address = f"http://127.0.0.1:{SERVE_HTTP[-1]}{PLAYGROUND}"
    print(f"\nPlayground: {address} after qwen3vl {' '.join(SERVE_HTTP)}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
