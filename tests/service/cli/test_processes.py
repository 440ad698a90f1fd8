"""The command as a process: serve and its signals, --local, pipes that close, colours."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from service.engines.fake import FakeEngine
from tests.service.cli.terminal import ROOT, command, process, wait_for
from tests.service.harness import image_bytes, running, until

pytestmark = pytest.mark.slow  # every test starts processes

ESCAPE = "\x1b"
LIMIT_S = 120  # generous: a busy machine starts processes slowly


def run(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("QWEN3VL_")}
    return subprocess.run(
        command(*words),
        cwd=ROOT,
        env=environment | env,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


# serve


def test_serve_announces_itself_answers_and_ends_with_ctrl_c() -> None:
    with process("serve", "--engine", "fake", "--port", 0) as server:
        assert server.stderr is not None
        line = wait_for(server.stderr, "SERVING on port ")[-1]
        assert line.endswith("Stop with Ctrl-C.\n")
        address = f"127.0.0.1:{line.split()[3].rstrip('.')}"
        healthy = run("health", "--server", address)
        assert (healthy.returncode, healthy.stdout) == (0, "SERVING\n")
        asked = run("run", "--server", address, "--prompt", "x", "--choice", "day", "--json")
        assert json.loads(asked.stdout)["result"]["text"] == "day"
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=LIMIT_S)
        assert server.returncode == 0
        assert out == ""
        assert "Traceback" not in err
        assert "Aborted" not in err


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_serve_runs_on_the_event_loop_of_the_setting(loop: str) -> None:
    words = ("--port", 0, "--http-port", 0, "--event-loop", loop)
    with process("serve", "--engine", "fake", *words) as server:
        assert server.stderr is not None
        line = wait_for(server.stderr, "SERVING on port ")[-1]
        port, url = re.findall(r"port (\d+), (http://[\d.:]+\d)", line)[0]
        # Its library is in the memory of the process, or not.
        assert ("/uvloop/" in Path(f"/proc/{server.pid}/maps").read_text()) == (loop == "uvloop")
        words = ("run", "--server", f"127.0.0.1:{port}", "--prompt", "x", "--choice", "day")
        assert run(*words, "--json").returncode == 0
        with urllib.request.urlopen(f"{url}/v1/models", timeout=LIMIT_S) as models:
            assert json.load(models)["data"]
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=LIMIT_S)
        assert (server.returncode, "Traceback" in err) == (0, False)


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        (
            "json_schema: {properties: {a: {type: integer, minimum: '3'}}}",
            'bad.yaml: json_schema: at "/properties/a/minimum": must be of type number',
        ),
        (
            "json_schema: {$ref: 'https://example.org/schema'}",
            'bad.yaml: json_schema: at "/$ref": points outside this schema',
        ),
        ("json_schema: {type: integer, minimum: 3, maximum: 2}", "bad.yaml: json_schema: no value"),
        ("choice: [yes, no, 1.10]", "bad.yaml: choice[2]: must be text, not the number 1.10; put"),
        ("needs_image: on", 'bad.yaml: needs_image: must be true or false, not "on"'),
        ("regex: '(?=a)(?!b)\\1'", "bad.yaml: regex: "),
        ("ebnf: 'root ::= ('", "bad: ebnf: ebnf cannot be compiled: EBNF parser error"),
        ("ebnf: 'root ::= root'", "bad: ebnf: ebnf cannot be compiled: it matches no text"),
    ],
)
@pytest.mark.parametrize("words", ["serve", "check"])
def test_a_bad_grammar_of_a_task_stops_the_start(
    tmp_path: Path, words: str, grammar: str, problem: str
) -> None:
    (tmp_path / "bad.yaml").write_text(f"description: d\nuser: u\n{grammar}\n")
    (tmp_path / "good.yaml").write_text("description: d\nuser: u\nebnf: 'root ::= [a-z]+'\n")
    done = run(words, "--engine", "fake", "--port", 0, "--tasks-dir", tmp_path)
    assert done.returncode == 1
    assert problem in done.stderr
    assert "SERVING" not in done.stderr
    assert "good" not in done.stderr.replace(str(tmp_path), "")
    assert "Traceback" not in done.stderr


def test_serve_on_a_taken_port_says_so_and_nothing_else_breaks() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("serve", "--engine", "fake", "--port", port)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"qwen3vl serve: --port (QWEN3VL_PORT): cannot listen on 127.0.0.1:{port}"
    )
    assert "add_port.cc" not in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--engine", "magic"], 2, "--engine (QWEN3VL_ENGINE): there is no engine 'magic'"),
        (["--prot", "1"], 2, "there is no setting --prot. Did you mean --port?"),
        (["--host", "0.0.0.0"], 2, "can be reached from other machines, which needs TLS"),
        pytest.param(
            *(["--model", "/nowhere/model"], 1, "there is no model folder 'model'"),
            marks=pytest.mark.slow,  # imports torch
        ),
    ],
)
def test_serve_that_cannot_start(words: list[str], code: int, says: str) -> None:
    done = run("serve", *words, QWEN3VL_PORT="0")
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # loads torch and the model
def test_ctrl_c_while_the_model_loads() -> None:
    with process("serve", "--port", 0) as server:
        assert server.stderr is not None
        wait_for(server.stderr, "listening ")
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=LIMIT_S)
        assert server.returncode == 0
        assert "SERVING" not in err
        assert "Traceback" not in err


def test_warnings_about_misspelt_variables_name_the_right_one() -> None:
    done = run("check", "--engine", "fake", "--port", 0, QWEN3VL_MAX_BATCHES="3")
    assert done.returncode == 0
    assert "QWEN3VL_MAX_BATCHES is not a setting" in done.stderr
    assert "QWEN3VL_MAX_BATCH?" in done.stderr


@pytest.mark.parametrize(
    ("engine", "unwanted"),
    [
        ("fake", ("torch", "transformers", "lmdeploy", "timm")),
        pytest.param("reference", ("lmdeploy",), marks=pytest.mark.slow),  # loads the model
    ],
)
def test_nothing_heavy_is_imported_that_the_engine_does_not_use(
    engine: str, unwanted: tuple[str, ...]
) -> None:
    program = (
        "import sys; from service.cli.check import check_command; "
        f"code = check_command(['--port', '0', '--engine', {engine!r}], print); "
        f"print('found:', [name for name in {unwanted} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("found: []\n")


# --local


def test_local_needs_no_server(tmp_path: Path) -> None:
    done = run("run", "--local", "--prompt", "x", "--choice", "night", QWEN3VL_ENGINE="fake")
    assert (done.returncode, done.stdout) == (0, "night\n")


@pytest.mark.slow  # one more process
def test_local_needs_no_key_and_no_certificate(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    done = run("tasks", "--local", QWEN3VL_ENGINE="fake", QWEN3VL_API_KEYS_FILE=missing)
    assert done.returncode == 0
    assert "image-analysis" in done.stdout


@pytest.mark.slow  # imports torch
def test_local_with_a_model_that_cannot_be_loaded() -> None:
    done = run("tasks", "--local", QWEN3VL_MODEL="/nowhere/model")
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no model folder 'model'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # loads torch and the model
def test_local_on_the_bundled_model_shows_progress(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(image_bytes(file_format="PNG"))
    done = run("run", "--local", "--prompt", "Which?", "--choice", "a", "--choice", "b", image)
    assert done.returncode == 0
    assert done.stdout in ("a\n", "b\n")
    assert done.stderr.startswith("… reading the decoder\n")
    assert "drawings: " in done.stderr


# Terminals and pipes


async def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    async with running() as started:
        with process("tasks", "--json", "--server", started.address) as reader:
            assert reader.stdout is not None
            reader.stdout.close()
            _, err = await asyncio.to_thread(reader.communicate, None, LIMIT_S)
            assert reader.returncode != 0
            assert err == ""


def on_a_terminal(*words: str, **env: str) -> str:
    """What a command writes when its output is a terminal."""
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", **env}
    with subprocess.Popen(
        command(*words), cwd=ROOT, stdin=side, stdout=side, stderr=side, env=environment
    ) as running_command:
        os.close(side)
        written = b""
        while True:
            try:
                part = os.read(main, 65536)
            except OSError:  # Linux reports the end of a terminal as EIO
                break
            if not part:
                break
            written += part
        running_command.wait(LIMIT_S)
    os.close(main)
    return written.decode()


@pytest.mark.slow  # several processes
def test_no_colour_where_it_is_not_wanted() -> None:
    wrong_use = ("run", "--prompt", "x", "--task", "y")
    assert ESCAPE in on_a_terminal(*wrong_use)
    assert "\x1b[3" not in on_a_terminal(*wrong_use, NO_COLOR="1")
    done = run(*wrong_use)
    assert ESCAPE not in done.stdout + done.stderr


async def test_ctrl_c_ends_a_call_without_a_traceback() -> None:
    engine = FakeEngine("one two")
    async with running(engine) as started:
        engine.token_delay_s = 30.0
        with process("run", "--prompt", "x", "--server", started.address) as waiting:
            await until(lambda: engine.active_requests == 1, LIMIT_S)
            waiting.send_signal(signal.SIGINT)
            out, err = await asyncio.to_thread(waiting.communicate, None, LIMIT_S)
            assert waiting.returncode == 130
            assert out == ""
            assert "Traceback" not in err
            await until(lambda: engine.cancelled_requests == 1, LIMIT_S)
