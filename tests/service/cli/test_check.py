"""check: every step that can fail says what is wrong and what to do; exit codes."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest

from service.cli.arguments import flag_of
from service.settings import Settings
from service.wiring import BUNDLED_MODEL
from tests.service.cli.terminal import Outcome, qwen3vl


def check(*words: object, env: dict[str, str] | None = None) -> Outcome:
    return qwen3vl("check", "--port", 0, *words, env=env)


def steps(done: Outcome) -> list[tuple[str, str]]:
    """First two words of each line that begins a step."""
    lines = (done.out + done.err).splitlines()
    return [tuple(line.split()[:2]) for line in lines if line[:1].islower()]  # type: ignore[misc]


def copy_of_the_model(folder: Path) -> Path:
    """The bundled model without its weights: broken in one more way, it fails before they count."""
    shutil.copytree(BUNDLED_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.slow
def test_check_passes_with_valid_settings() -> None:
    done = check("--engine", "fake")
    assert (done.code, done.err) == (0, "")
    assert steps(done) == [
        ("settings", "ok"),
        ("tasks", "ok"),
        ("port", "ok"),
        ("workers", "ok"),
        ("model", "ok"),
        ("warm-up", "ok"),
    ]
    assert "no TLS, no API keys, this machine only" in done.out
    assert "fake on the fake engine, context 32768 tokens" in done.out
    assert "1 constrained tokens about an image in " in done.out
    assert done.out.endswith("qwen3vl serve\n")


@pytest.mark.slow  # loads torch and the model
def test_the_bundled_model() -> None:
    done = check()
    assert done.code == 0
    assert "drawings on the reference engine" in done.out
    assert "deepstack on" in done.out
    assert "constrained tokens about an image in " in done.out
    assert [line for line in done.err.splitlines() if not line.startswith("… ")] == []
    assert "… reading the decoder\n" in done.err


@pytest.mark.slow
def test_valid_tls_and_keys_pass(certificate: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"me:{hashlib.sha256(b'secret').hexdigest()}\n")
    key = certificate.with_suffix(".key")
    files = ("--tls-cert", certificate, "--tls-key", key, "--api-keys-file", keys)
    done = check("--engine", "fake", "--host", "0.0.0.0", *files)
    assert done.code == 0
    assert "TLS, callers need a key or a certificate, reachable from other machines" in done.out


# Settings


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--engine", "magic"],
            "--engine (QWEN3VL_ENGINE): there is no engine 'magic'",
        ),
        (["--max-batch", "0"], "--max-batch (QWEN3VL_MAX_BATCH): "),
        (["--max-bath", "3"], "there is no setting --max-bath. Did you mean --max-batch?"),
        (["--threads"], "--threads: expected one argument"),
        (["--tasks-dir", "/nowhere"], "--tasks-dir (QWEN3VL_TASKS_DIR): there is no folder"),
        (["--api-keys-file", "/nowhere"], "--api-keys-file (QWEN3VL_API_KEYS_FILE): there is no"),
        (["--tls-cert", "/nowhere"], "--tls-key (QWEN3VL_TLS_KEY): tls_cert and tls_key belong"),
        (["--host", "0.0.0.0"], "--host (QWEN3VL_HOST): 0.0.0.0 can be reached from other"),
    ],
)
def test_invalid_settings_fail_the_check(words: list[str], says: str) -> None:
    done = check(*words)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert "`qwen3vl check --help` lists the settings." in done.err


def test_every_wrong_setting_is_named_at_once() -> None:
    done = check("--threads", "0", env={"QWEN3VL_DEVICE": "tpu"})
    assert done.code == 2
    assert "--threads (QWEN3VL_THREADS)" in done.err
    assert "--device (QWEN3VL_DEVICE)" in done.err


@pytest.mark.slow
def test_help_lists_every_setting() -> None:
    done = check("--help")
    assert (done.code, done.err) == (0, "")
    for name, field in Settings.model_fields.items():
        flag = flag_of(name)
        assert flag in done.out or flag.replace("--", "--no-") in done.out
        assert field.description
    for default in ("[default: 50051]", "20971520 (20 MiB)", "16 with reference, 64 with lmdeploy"):
        assert default in " ".join(done.out.replace("│", " ").split())
    assert "…" not in done.out  # no flag is cut on a terminal of 80 columns
    assert "null" not in done.out
    assert "fake" not in done.out


# Tasks, port, keys, certificates


def test_invalid_task_files_fail_the_check(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.yaml").write_text("user: Count.\nshema: {}\n")
    done = check("--engine", "fake", "--tasks-dir", tmp_path)
    assert done.code == 1
    assert steps(done)[-1] == ("tasks", "FAILED:")
    for problem in ("a.json: file: is not JSON", "b.yaml: description: ", "b.yaml: shema: "):
        assert problem in done.err
    assert "--tasks-dir (QWEN3VL_TASKS_DIR)" in done.err


@pytest.mark.slow
def test_a_valid_task_file_passes(tmp_path: Path) -> None:
    (tmp_path / "count.yaml").write_text("description: Counts.\nuser: Count.\nregex: '[0-9]'\n")
    done = check("--engine", "fake", "--tasks-dir", tmp_path)
    assert done.code == 0
    assert "tasks     ok  count, image-analysis" in done.out


def test_a_port_in_use_fails_the_check() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = qwen3vl("check", "--engine", "fake", "--port", port)
    assert done.code == 1
    assert steps(done)[-1] == ("port", "FAILED:")
    assert f"--port (QWEN3VL_PORT): cannot listen on 127.0.0.1:{port}; it is taken" in done.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (b"me:secret\n", "line 1 must be 'name:SHA-256"),
        (b"# none yet\n", "there is no key in the file"),
    ],
)
def test_an_invalid_keys_file_fails_the_check(content: bytes, says: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_bytes(content)
    done = check("--engine", "fake", "--api-keys-file", keys)
    assert done.code == 1
    assert "port      FAILED: --api-keys-file (QWEN3VL_API_KEYS_FILE): " in done.err
    assert says in done.err
    assert "secret" not in done.err


def test_an_invalid_certificate_fails_the_check(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("hello")
    done = check("--engine", "fake", "--tls-cert", text, "--tls-key", text)
    assert done.code == 1
    assert "port      FAILED: " in done.err
    assert "must be PEM files" in done.err


# Model


def failed_model(folder: Path | str) -> str:
    """What check says about a model that cannot be loaded."""
    done = check("--model", folder)
    assert done.code == 1
    assert steps(done)[-1] == ("model", "FAILED:")
    assert f"--model (QWEN3VL_MODEL) is {folder}: give 'bundled', a checkpoint folder" in done.err
    assert "Traceback" not in done.err
    return done.err


@pytest.mark.slow
def test_a_model_folder_that_does_not_exist(tmp_path: Path) -> None:
    assert "there is no model folder 'nowhere'" in failed_model(tmp_path / "nowhere")


@pytest.mark.slow
def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert "has no config.json" in failed_model(tmp_path)


@pytest.mark.slow
def test_a_truncated_config_json_is_named(tmp_path: Path) -> None:
    model = copy_of_the_model(tmp_path / "model")
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text[:100])
    assert "config.json is not valid JSON" in failed_model(model)


@pytest.mark.slow
def test_a_model_of_another_kind(tmp_path: Path) -> None:
    model = copy_of_the_model(tmp_path / "model")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (model / "config.json").write_text(json.dumps(config))
    assert "LlamaForCausalLM" in failed_model(model)


@pytest.mark.slow
def test_a_model_without_weights(tmp_path: Path) -> None:
    model = copy_of_the_model(tmp_path / "model")
    assert "neither model.safetensors.index.json nor model.safetensors" in failed_model(model)


@pytest.mark.slow
def test_truncated_weights_are_named(tmp_path: Path) -> None:
    model = copy_of_the_model(tmp_path / "model")
    whole = (BUNDLED_MODEL / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:1_000_000])
    assert "model.safetensors cannot be read" in failed_model(model)


@pytest.mark.slow
def test_a_missing_device_is_named() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = check("--device", "cuda")
    assert done.code == 1
    assert "torch sees no GPU; use device cpu" in done.err


@pytest.mark.slow
def test_a_broken_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "service.engines.reference.worker", None)
    done = check()
    assert done.code == 1
    assert steps(done)[-1] == ("model", "FAILED:")
    assert "A package is missing or broken." in done.err


@pytest.mark.slow
def test_a_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = check("--model", "somebody/a-model-that-nobody-has")
    assert done.code == 1
    assert "cannot fetch model 'somebody/a-model-that-nobody-has'" in done.err
    assert "give a local folder" in done.err


# --print-settings


def printed(done: Outcome) -> dict[str, tuple[str, str]]:
    """Name of a setting -> value and origin."""
    found = {}
    for line in done.out.splitlines():
        name, rest = line.split(None, 1)
        value, _, origin = rest.rpartition("(")
        found[name] = value.strip(), origin.removesuffix(")")
    return found


def test_settings_are_printed_with_their_origin() -> None:
    env = {"QWEN3VL_MAX_BATCH": "7", "QWEN3VL_METRICS_PORT": "9090", "QWEN3VL_MAX_IMAGES": "3"}
    done = qwen3vl(
        "check", "--print-settings", "--max-images=5", "--no-reflection", "--port", 0, env=env
    )
    found = printed(done)
    assert done.code == 0
    assert found["max_images"] == ("5", "flag --max-images"), "a flag wins over a variable"
    assert found["port"] == ("0", "flag --port")
    assert found["reflection"] == ("False", "flag --no-reflection")
    assert found["max_batch"] == ("7", "variable QWEN3VL_MAX_BATCH")
    assert found["admin_port"] == ("9090", "variable QWEN3VL_METRICS_PORT")
    assert found["host"] == ("127.0.0.1", "default")
    assert found["tls_cert"] == ("unset", "default")
    assert found["dtype"] == ("auto", "default"), "as the engine has it"
    assert "backend" not in found, "a setting of another engine"
    every = set(printed(qwen3vl("check", "--print-settings", "--engine", "lmdeploy")))
    remote = ("--engine", "remote", "--remote-url", "http://127.0.0.1:1")
    every |= set(printed(qwen3vl("check", "--print-settings", *remote)))
    every |= set(printed(qwen3vl("check", "--print-settings", "--engine", "ray")))
    assert every | found.keys() == set(Settings.model_fields) - {"script"}


def test_a_key_is_no_flag_and_is_not_printed() -> None:
    flags = ("check", "--print-settings", "--engine=remote", "--remote-url=http://127.0.0.1:1")
    env = {"QWEN3VL_REMOTE_KEY": "sk-secret"}
    done = qwen3vl(*flags, env=env)
    assert printed(done)["remote_key"] == ("**********", "variable QWEN3VL_REMOTE_KEY")
    for given in (("--remote-key=sk-secret",), ("--remote-key", "sk-secret")):
        refused = qwen3vl(*flags, *given)
        assert refused.code == 2
        assert "set the variable QWEN3VL_REMOTE_KEY" in refused.err
    for one in (done, refused):
        assert "sk-secret" not in one.out + one.err


def test_settings_that_are_wrong_are_not_printed() -> None:
    done = qwen3vl("check", "--print-settings", "--max-images", 0)
    assert (done.code, done.out) == (2, "")
    assert "--max-images" in done.err
