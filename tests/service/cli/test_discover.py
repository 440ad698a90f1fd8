"""``qwen3vl discover`` against scripted servers and our own: tables, JSON, exit codes, errors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from service import __version__
from tests.service.cli.terminal import called
from tests.service.engines.remote.server_kinds import LLAMA, OLLAMA, VLLM, running
from tests.service.harness import running as own_server
from tests.service.http_api.harness import serving

pytestmark = pytest.mark.slow


async def test_a_table_with_the_evidence_of_each_fact() -> None:
    async with running(LLAMA) as server:
        done = await called("discover", f"{server.url}/v1/")
    assert done.code == 0, done.err
    first, *lines = done.out.splitlines()
    assert first == f"{server.url}  vision-model.gguf"
    facts = {line.split()[0]: line for line in lines if line.strip()}
    assert facts["context_length"].split(maxsplit=2)[1:] == [
        "8192",
        "/props: default_generation_settings.n_ctx",
    ]
    assert facts["vision"].split(maxsplit=2)[1:] == ["no", "/props: modalities.vision"]
    assert facts["grammar.json_schema"].split()[1] == "yes"
    assert f"looking at {server.url}" in done.err


async def test_json_of_several_servers() -> None:
    async with running(VLLM) as one, running(OLLAMA) as other:
        done = await called("discover", "--json", one.url, other.url)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [(server["url"], server["model"]) for server in found] == [
        (one.url, "text-only-7b"),
        (other.url, "plain:latest"),
    ]
    facts = {fact["name"]: fact for fact in found[0]["facts"]}
    assert facts["version"] == {
        "name": "version",
        "value": "0.33.0",
        "evidence": "/version: version",
    }
    assert facts["size_bytes"]["value"] == "unknown"


async def test_without_probes_nothing_is_generated() -> None:
    async with running(VLLM) as server:
        done = await called("discover", "--no-probe", server.url)
        assert server.requests == []
    assert done.code == 0
    assert "grammar.json_schema" not in done.out


async def test_a_server_that_is_not_there_does_not_hide_the_others(unused_tcp_port: int) -> None:
    missing = f"http://127.0.0.1:{unused_tcp_port}"
    async with running(VLLM) as server:
        done = await called("discover", "--no-probe", missing, server.url)
    assert done.code == 1
    assert f"error: {missing}: no connection" in done.err
    assert "text-only-7b" in done.out


async def test_a_key_is_sent_and_asked_for() -> None:
    async with running(VLLM) as server:
        await called("discover", "--no-probe", server.url, env={"QWEN3VL_REMOTE_KEY": "s3cret"})
        assert {headers.get("Authorization") for headers in server.headers} == {"Bearer s3cret"}
    async with running(replace(VLLM, key="other")) as server:
        done = await called("discover", server.url, env={"QWEN3VL_REMOTE_KEY": "s3cret"})
    assert done.code == 1
    assert "refuses the one that was sent (status 401)" in done.err
    assert "s3cret" not in done.err + done.out


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://a:b@c", "http://x/?q=1"])
async def test_an_argument_that_is_no_url(url: str) -> None:
    done = await called("discover", url)
    assert done.code == 2
    assert "Invalid value" in done.err


async def test_a_kind_that_does_not_exist() -> None:
    done = await called("discover", "--kind", "lamma", "http://127.0.0.1:1")
    assert done.code == 2
    assert "llama.cpp" in done.err


async def test_without_a_url_this_machine_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engines.remote.discovery.LOCAL_PORTS", {})
    done = await called("discover")
    assert done.code == 1
    assert "no model server answers on the usual ports" in done.err
    async with running(VLLM) as server:
        done = await called("discover", "--no-probe", env={"VLLM_MLX_ENDPOINT": server.url})
    assert done.code == 0
    assert "text-only-7b" in done.out


async def test_our_own_server_over_grpc() -> None:
    async with own_server() as started:
        done = await called("discover", "--json", f"grpc://{started.address}")
    assert done.code == 0, done.err
    (found,) = json.loads(done.out)
    facts = {fact["name"]: fact["value"] for fact in found["facts"]}
    assert found["model"] == "fake"
    assert facts["kind"] == "qwen3vl-grpc"
    assert facts["version"] == __version__
    assert (facts["vision"], facts["grammar.regex"], facts["sampling.seed"]) == ("yes",) * 3
    assert facts["enforces_grammars"] in ("yes", "no")


async def test_our_own_server_over_http() -> None:
    async with serving() as server:
        done = await called("discover", "--json", f"http://127.0.0.1:{server.http.port}")
    assert done.code == 0, done.err
    (found,) = json.loads(done.out)
    facts = {fact["name"]: fact["value"] for fact in found["facts"]}
    assert facts["kind"] == "qwen3vl-http"
    assert facts["version"] == __version__
    assert facts["vision"] == "yes"
    assert facts["refuses_unknown_formats"] == "yes"
    assert isinstance(facts["context_length"], int)
