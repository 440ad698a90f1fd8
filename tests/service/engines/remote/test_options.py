"""The settings of the remote engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from service.engines.remote.options import RemoteSettings
from service.engines.remote.servers import SERVERS
from service.settings import SettingsError, load_settings
from service.wiring import build_engine
from tests.service.engines.remote.scripted import saying, scripted
from tests.service.engines.remote.serving import in_front_of, question

URL = "http://127.0.0.1:8000"


def settings(**values: Any) -> RemoteSettings:
    found = load_settings(engine="remote", **{"remote_url": URL, **values}).engine_settings
    assert isinstance(found, RemoteSettings)
    return found


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://host/openai/v1", "https://host/openai"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
        ("grpc://host:50051", "grpc://host:50051"),
    ],
)
def test_the_base_of_a_url(given: str, base: str) -> None:
    assert settings(remote_url=given).remote_url == base


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"remote_url": None}, "remote_url: engine=remote needs the URL of a server"),
        ({"remote_url": "127.0.0.1:8000"}, "remote_url: must be a URL such as"),
        ({"remote_url": "http://user:pass@host"}, "must not contain a name or password"),
        ({"remote_url": "http://host/v1?key=1"}, "must not have a query"),
        ({"remote_url": "http://host:70000"}, "a port that is not a number from 0 to 65535"),
        ({"remote_url": "grpc://host"}, "must be grpc://HOST:PORT"),
        ({"remote_kind": "qwen3vl-grpc"}, "belongs to grpc:// and grpcs:// URLs"),
        ({"remote_kind": "vllm", "remote_url": "grpc://host:1"}, "belongs to grpc://"),
        ({"remote_discover": True}, "remote_url: has no effect beside remote_discover"),
        ({"remote_min_pixels": 4096, "remote_max_pixels": 2048}, "must not be above"),
        ({"remote_min_pixels": 10}, "remote_min_pixels: "),
        ({"remote_ca": Path("/no/such.pem")}, "remote_ca: there is no file /no/such.pem"),
        ({"remote_ca": Path(__file__)}, "remote_ca: needs a remote_url with https://"),
        ({"remote_cert": Path(__file__)}, "remote_cert and remote_cert_key belong together"),
        ({"remote_key": "k", "remote_key_file": Path(__file__)}, "has no effect beside"),
        ({"max_batch": 3}, "max_batch: is a setting of the server that runs the model"),
        ({"remote_retries": 11}, "remote_retries: "),
        ({"remote_silence_s": 0}, "remote_silence_s: "),
    ],
)
def test_wrong_settings_name_the_setting(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as raised:
        settings(**values)
    assert words in str(raised.value)
    assert "pass" not in str(raised.value).replace("password", "")


def test_every_kind_of_server_can_be_named() -> None:
    assert set(get_args(RemoteSettings.model_fields["remote_kind"].annotation)) == {
        "auto",
        *SERVERS,
    }


@pytest.mark.parametrize("content", [b"", b"two\nlines", b"\xff\xfe", b"k" * 20_000])
def test_a_key_file_without_one_key(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="must hold one API key") as raised:
        build_engine(load_settings(engine="remote", remote_url=URL, remote_key_file=file))
    assert "two" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["file", "variable"])
async def test_the_key_is_sent_and_never_shown(
    tmp_path: Path, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    (tmp_path / "key").write_text("sk-secret\n")
    given: dict[str, Any] = {
        "file": {"remote_key_file": tmp_path / "key"},
        "variable": {"remote_key": "sk-secret"},
    }[by]
    async with scripted(saying("Hello")) as back, in_front_of(back, **given) as front:
        await front.stub.RunTask(question(schema=None), timeout=60)
        assert back.asked[0].headers["authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in caplog.text
    assert "sk-secret" not in repr(settings(**given))
