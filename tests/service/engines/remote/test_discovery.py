"""Discovery against scripted servers of each kind: every known fact, and no guess from a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from service.engines.remote.backend import State
from service.engines.remote.discovery import Description, Discoveries, DiscoveryError, local_urls
from service.engines.remote.wire import Unreachable, Wire, WireOptions
from service.types import GrammarKind
from tests.service.engines.remote.server_kinds import (
    KINDS,
    LLAMA,
    LM_STUDIO,
    MISTRAL_RS,
    OLLAMA,
    SGLANG,
    UNKNOWN,
    VLLM,
    VLLM_MLX,
    Script,
    renamed,
    running,
)

pytestmark = pytest.mark.slow

YES, NO, UNSURE = State.YES, State.NO, State.UNKNOWN
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
GRAMMARS = ("json_schema", "regex", "choice", "ebnf")


def abilities(names: tuple[str, ...], prefix: str, yes: str, unsure: str = "") -> dict[str, State]:
    """Facts of one group: the ones named in ``yes``, those that stay unknown, and no for the rest."""
    return {
        f"{prefix}.{name}": YES if name in yes.split() else UNSURE if name in unsure.split() else NO
        for name in names
    }


EXPECTED: dict[str, dict[str, Any]] = {
    "vllm": {
        "version": "0.33.0", "context_length": 6144, "vision": YES, "token_limit": "max_completion_tokens",
        "quantization": UNSURE, "size_bytes": UNSURE, "loaded": UNSURE, "thinking": NO,
        "refuses_unknown_formats": YES, "json_schema.pattern": YES,
        **abilities(GRAMMARS, "grammar", "json_schema regex choice ebnf"),
        **abilities(SAMPLING, "sampling", "temperature top_p top_k repetition_penalty seed"),
    },
    "sglang": {
        "version": "0.5.10", "context_length": 12288, "vision": NO, "token_limit": "max_completion_tokens",
        "quantization": "fp8", "loaded": YES, "thinking": YES, "refuses_unknown_formats": YES,
        **abilities(GRAMMARS, "grammar", "json_schema regex choice ebnf"),
        **abilities(SAMPLING, "sampling", "temperature top_p top_k repetition_penalty seed"),
    },
    "lmdeploy": {
        "version": UNSURE, "context_length": UNSURE, "vision": YES, "quantization": UNSURE,
        "json_schema.pattern": NO, "refuses_unknown_formats": YES,
        **abilities(GRAMMARS, "grammar", "json_schema regex choice"),
        **abilities(SAMPLING, "sampling", "temperature top_p top_k repetition_penalty seed"),
    },
    "llama.cpp": {
        "version": "b11549-abc", "context_length": 8192, "trained_context_length": 262144, "vision": NO,
        "quantization": "Q4_K - Medium", "size_bytes": 1106966528, "parameters": 1720574976, "loaded": YES,
        "refuses_unknown_formats": YES,
        **abilities(GRAMMARS, "grammar", "json_schema choice ebnf"),
        **abilities(SAMPLING, "sampling", "temperature top_p top_k repetition_penalty seed"),
    },
    "ollama": {
        "version": "0.12.9", "context_length": 4096, "trained_context_length": 262144, "vision": YES,
        "quantization": "Q4_K_M", "size_bytes": 1900000000, "parameters": "2.1B", "loaded": YES,
        "thinking": NO, "token_limit": "num_predict", "refuses_unknown_formats": NO,
        **abilities(GRAMMARS, "grammar", "json_schema"),
        **abilities(SAMPLING, "sampling", "temperature top_p top_k repetition_penalty seed"),
    },
    "lm-studio": {
        "version": UNSURE, "context_length": 4096, "trained_context_length": 262144, "vision": YES,
        "quantization": "Q4_K_M", "size_bytes": 1300000000, "parameters": "2B", "loaded": YES,
        "token_limit": "max_tokens", "refuses_unknown_formats": YES,
        **abilities(GRAMMARS, "grammar", "json_schema"),
    },
    "vllm-mlx": {
        "version": "0.4.1", "context_length": UNSURE, "vision": YES, "loaded": YES, "token_limit": "max_tokens",
        "refuses_unknown_formats": NO,
        **abilities(GRAMMARS, "grammar", "json_schema"),
        **abilities(SAMPLING, "sampling", "temperature top_p top_k repetition_penalty"),
    },
    "mistral.rs": {
        "version": "0.9.5", "context_length": UNSURE, "vision": YES, "loaded": YES,
        "token_limit": "max_completion_tokens", "refuses_unknown_formats": YES,
        **abilities(GRAMMARS, "grammar", "json_schema regex choice"),
        **abilities(SAMPLING, "sampling", "temperature top_p top_k repetition_penalty"),
    },
    "unknown": {
        "version": UNSURE, "context_length": UNSURE, "vision": NO, "loaded": UNSURE,
        "refuses_unknown_formats": NO, "thinking": NO,
        **abilities(GRAMMARS, "grammar", ""),
        **abilities(SAMPLING, "sampling", "", unsure="temperature top_p top_k repetition_penalty seed"),
    },
}  # fmt: skip
"""Kind -> what is known of the scripted server of this kind."""


async def described(
    script: Script, *, kind: str | None = None, model: str | None = None, probe: bool = True
) -> Description:
    async with running(script) as server:
        return await describe(server.url, Discoveries(), kind=kind, model=model, probe=probe)


async def describe(url: str, discoveries: Discoveries, **options: Any) -> Description:
    wire = Wire(url, WireOptions())
    try:
        return await discoveries.describe(wire, **options)
    finally:
        await wire.close()


def values(description: Description) -> dict[str, Any]:
    return {fact.name: fact.value for fact in description.facts}


def wrong(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (found.get(name), value)
        for name, value in expected.items()
        if found.get(name) != value
    }


@pytest.mark.parametrize("kind", KINDS)
async def test_every_fact_of_each_kind_is_known_under_any_name(kind: str) -> None:
    by_name = {}
    for name in (KINDS[kind].model, "Qwen3-VL-235B-A22B-Instruct-Q8_0", "m"):
        description = await described(renamed(KINDS[kind], name))
        found = values(description)
        assert found.pop("answers_as") == name
        assert found["kind"] == kind
        assert wrong(found, EXPECTED[kind]) == {}
        assert all(fact.evidence for fact in description.facts)
        by_name[name] = found
    first = next(iter(by_name.values()))
    assert all(one == first for one in by_name.values())


async def test_the_engine_gets_what_was_found() -> None:
    back_end = (await described(VLLM_MLX)).back_end
    assert (back_end.kind, back_end.version, back_end.model) == ("vllm-mlx", "0.4.1", "default")
    assert back_end.token_limit == "max_tokens"
    assert back_end.vision.state is YES
    assert back_end.grammar_kinds == {GrammarKind.JSON_SCHEMA}
    assert back_end.sampling_options == {
        "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty"
    }  # fmt: skip
    assert back_end.context_length is None
    llama = (await described(LLAMA)).back_end
    assert llama.context_length == 8192
    assert llama.details["quantization"] == "Q4_K - Medium"


async def test_without_probes_nothing_is_generated() -> None:
    async with running(LLAMA) as server:
        found = values(await describe(server.url, Discoveries(), probe=False))
        assert server.requests == []
    assert found["context_length"] == 8192
    assert "grammar.json_schema" not in found


async def test_a_probe_that_fails_is_unknown_and_not_no() -> None:
    refusing = replace(VLLM, vision=None, formats=("text",))
    found = values(await described(refusing))
    assert found["vision"] is UNSURE
    assert found["grammar.json_schema"] is UNSURE
    assert found["json_schema.pattern"] is UNSURE
    assert found["refuses_unknown_formats"] is YES


async def test_images_without_a_count_of_tokens_prove_nothing() -> None:
    description = await described(replace(VLLM, usage=False))
    vision = description.fact("vision")
    assert vision is not None
    assert vision.value is UNSURE
    assert "2 of 2 colours right" in vision.evidence


async def test_right_colours_without_tokens_for_the_images_prove_nothing() -> None:
    description = await described(replace(VLLM, image_tokens=0))
    assert values(description)["vision"] is UNSURE


async def test_the_field_that_limits_tokens_is_used_from_then_on() -> None:
    async with running(replace(VLLM, limits=("max_tokens",))) as server:
        await describe(server.url, Discoveries())
        fields = [one.keys() & {"max_tokens", "max_completion_tokens"} for one in server.requests]
    assert fields[0] == {"max_tokens", "max_completion_tokens"}
    assert all(one == {"max_tokens"} for one in fields[1:])


async def test_dropped_images_are_no_vision() -> None:
    description = await described(replace(VLLM, vision=False))
    assert values(description)["vision"] is NO


async def test_a_schema_that_is_dropped_is_a_no_with_the_text_as_evidence() -> None:
    fact = (await described(replace(VLLM, schema=lambda body: None))).fact("grammar.json_schema")
    assert fact is not None
    assert fact.value is NO
    assert "beside the grammar" in fact.evidence


async def test_thoughts_are_turned_off_for_the_probes_that_follow() -> None:
    async with running(SGLANG) as server:
        description = await describe(server.url, Discoveries())
        off = [one for one in server.requests if "chat_template_kwargs" in one]
    fact = description.fact("thinking")
    assert fact is not None
    assert fact.value is YES
    assert "it stops with" in fact.evidence
    assert len(off) > 10
    assert values(description)["grammar.json_schema"] is YES


async def test_thoughts_that_cannot_be_turned_off() -> None:
    fact = (await described(replace(SGLANG, thoughts=lambda body: True))).fact("thinking")
    assert fact is not None
    assert fact.value is YES
    assert "it goes on with" in fact.evidence


async def test_the_loaded_context_of_ollama_is_not_that_of_the_training() -> None:
    pages = {**OLLAMA.pages, "/api/ps": {"models": []}}
    found = values(await described(replace(OLLAMA, pages=pages), probe=False))
    assert found["context_length"] is UNSURE
    assert found["trained_context_length"] == 262144
    assert found["loaded"] is NO


async def test_results_are_kept_and_renewed_with_the_version() -> None:
    discoveries = Discoveries()
    async with running(VLLM) as server:
        first = await describe(server.url, discoveries)
        asked = len(server.requests)
        assert await describe(server.url, discoveries) == first
        assert len(server.requests) == asked
        pages = {**VLLM.pages, "/version": {"version": "0.34.0"}}
        server.script = replace(VLLM, pages=pages, schema=lambda body: None)
        renewed = values(await describe(server.url, discoveries))
        assert renewed["version"] == "0.34.0"
        assert renewed["grammar.json_schema"] is NO
        again = len(server.requests)
        assert again > asked
        discoveries.forget(server.url)
        await describe(server.url, discoveries)
        assert len(server.requests) > again


async def test_another_model_behind_the_url_is_probed_anew() -> None:
    discoveries = Discoveries()
    async with running(VLLM) as server:
        await describe(server.url, discoveries)
        server.script = renamed(replace(VLLM, vision=False), "other")
        found = await describe(server.url, discoveries)
        assert found.back_end.model == "other"
        assert found.back_end.vision.state is NO


async def test_a_server_with_several_models_needs_a_name() -> None:
    pages = {
        "/v1/models": {"data": [{"id": "a", "owned_by": "vllm"}, {"id": "b", "owned_by": "vllm"}]}
    }
    several = replace(VLLM, pages=pages)
    with pytest.raises(DiscoveryError, match="one must be named: a, b"):
        await described(several)
    with pytest.raises(DiscoveryError, match="has no model 'c'; it has: a, b"):
        await described(several, model="c")
    assert (await described(several, model="b", probe=False)).back_end.model == "b"


async def test_the_only_loaded_model_needs_no_name() -> None:
    loaded = LM_STUDIO.pages["/api/v1/models"]["models"][0]
    other = {**loaded, "key": "another", "loaded_instances": []}
    pages = {**LM_STUDIO.pages, "/api/v1/models": {"models": [other, loaded]}}
    found = await described(replace(LM_STUDIO, pages=pages), probe=False)
    assert found.back_end.model == "thing"


async def test_models_that_are_not_loaded_are_not_probed() -> None:
    pages = {**OLLAMA.pages, "/api/ps": {"models": []}}
    async with running(replace(OLLAMA, pages=pages)) as server:
        wire = Wire(server.url, WireOptions())
        (one,) = await Discoveries().describe_all(wire)
        await wire.close()
        assert server.requests == []
    assert values(one)["vision"] is YES


async def test_the_kind_that_the_operator_names_holds() -> None:
    found = values(await described(UNKNOWN, kind="vllm", probe=False))
    assert found["kind"] == "vllm"


async def test_older_servers_are_recognised() -> None:
    old = {
        "/v1/models": LM_STUDIO.pages["/v1/models"],
        "/api/v0/models": {"data": [{
            "id": "thing", "object": "model", "type": "vlm", "compatibility_type": "gguf", "quantization": "Q4_0",
            "state": "loaded", "max_context_length": 32768, "loaded_context_length": 2048,
        }]},
    }  # fmt: skip
    found = values(await described(replace(LM_STUDIO, pages=old), probe=False))
    assert (found["kind"], found["context_length"], found["vision"]) == ("lm-studio", 2048, YES)
    without = {path: page for path, page in MISTRAL_RS.pages.items() if path != "/v1/system/info"}
    found = values(await described(replace(MISTRAL_RS, pages=without), probe=False))
    assert (found["kind"], found["version"]) == ("mistral.rs", UNSURE)


@pytest.mark.parametrize(
    ("pages", "reason"),
    [
        ({"/v1/models": {"data": []}}, "lists no model"),
        ({"/v1/models": "<html>"}, "does not list its models in /v1/models, which has status 200"),
        ({}, "status 404"),
    ],
)
async def test_a_server_without_models_is_an_error(pages: Any, reason: str) -> None:
    with pytest.raises(DiscoveryError, match=reason):
        await described(replace(VLLM, pages=pages))


async def test_nobody_listens(unused_tcp_port: int) -> None:
    with pytest.raises(Unreachable):
        await describe(f"http://127.0.0.1:{unused_tcp_port}", Discoveries())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "junk", [None, -7, "text", [], [None, 7, "x"], {"data": 7}, {"models": [7]}]
)
async def test_pages_with_other_values_are_no_crash(kind: str, junk: Any) -> None:
    pages = {
        path: (lambda body: junk) if callable(page) else junk
        for path, page in KINDS[kind].pages.items()
        if path != "/v1/models"
    }
    listed = {
        "/v1/models": {
            "data": [{"id": "a", "meta": junk, "status": junk, "max_model_len": junk}, junk]
        }
    }
    script = replace(KINDS[kind], pages={**pages, **listed})
    try:
        found = await described(script, kind=kind, probe=False)
    except DiscoveryError:
        return
    assert found.back_end.context_length is None


async def test_a_named_endpoint_is_found_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(VLLM_MLX) as one, running(LLAMA) as other:
        monkeypatch.setenv("VLLM_MLX_ENDPOINT", f"{one.url}/v1")
        port = int(other.url.rsplit(":", 1)[1])
        monkeypatch.setattr("service.engines.remote.discovery.LOCAL_PORTS", {port: "llama.cpp"})
        assert await local_urls(WireOptions(key="secret")) == [one.url, other.url]
        assert all("Authorization" not in headers for headers in other.headers)


async def test_an_endpoint_that_is_no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MLX_ENDPOINT", "localhost:8000")
    with pytest.raises(DiscoveryError, match="VLLM_MLX_ENDPOINT must be a URL"):
        await local_urls()
