"""Options and outcomes of requests, in our words and in LMDeploy's: nothing is left to a default."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lmdeploy_ext.families import QWEN3_5, QWEN3_VL
from service.engines.lmdeploy.options import PYTORCH, TURBOMIND, Options
from service.error_table import REASONS
from service.errors import (
    ContextTooLong,
    EngineUnavailable,
    GrammarError,
    InternalError,
    InvalidRequest,
)
from service.types import GrammarKind, Sampling
from tests.service.analysed import analysed

pytestmark = pytest.mark.slow  # importing LMDeploy takes seconds

GREEDY = Sampling(max_tokens=9)


def mapped(sampling: Sampling, backend: str = TURBOMIND, **changes: Any) -> Any:
    from service.engines.lmdeploy.sampling import generation_config

    most = sampling.max_tokens or 0
    return generation_config(sampling, backend, max_new_tokens=most, stop_ids=[5, 6], **changes)


# Sampling options


def test_every_field_of_lmdeploy_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmdeploy.messages import GenerationConfig

    from service.engines.lmdeploy import sampling

    seen: dict[str, Any] = {}

    def record(**given: Any) -> Any:
        seen.update(given)
        return SimpleNamespace()

    monkeypatch.setattr(sampling, "GenerationConfig", record)
    mapped(GREEDY)
    assert seen.keys() == {field.name for field in fields(GenerationConfig)}


def test_greedy_keeps_the_repetition_penalty() -> None:
    found = mapped(replace(GREEDY, repetition_penalty=1.3))
    assert (found.top_k, found.temperature, found.top_p, found.min_p) == (1, 1.0, 1.0, 0.0)
    assert found.repetition_penalty == 1.3
    assert found.max_new_tokens == 9
    assert found.stop_token_ids == [5, 6]
    assert not found.ignore_eos


def test_sampled_options_arrive_one_by_one() -> None:
    options = Sampling(7, 0.6, 0.9, 40, 1.1, seed=2**64 - 1)
    found = mapped(options)
    assert (found.max_new_tokens, found.temperature, found.top_p) == (7, 0.6, 0.9)
    assert (found.top_k, found.repetition_penalty, found.random_seed) == (40, 1.1, 2**64 - 1)
    assert mapped(replace(options, top_k=0)).top_k == 0, "all tokens, not LMDeploy's 50"


def test_a_seed_is_drawn_where_there_is_none_and_fits_the_backend() -> None:
    assert len({mapped(GREEDY).random_seed for _ in range(8)}) == 8
    assert all(mapped(GREEDY, PYTORCH).random_seed < 2**32 for _ in range(8))
    # The PyTorch engine drops the upper half; it has to count all the same.
    low, high = (mapped(replace(GREEDY, seed=seed), PYTORCH).random_seed for seed in (1, 1 + 2**32))
    assert low != high
    assert max(low, high) < 2**32


def test_top_k_that_turbomind_would_cut_is_refused_by_name() -> None:
    from service.engines.lmdeploy.sampling import check

    check(Sampling(top_k=1024), TURBOMIND)
    check(Sampling(top_k=1025), PYTORCH)
    with pytest.raises(InvalidRequest) as raised:
        check(Sampling(top_k=1025), TURBOMIND)
    assert [one.field for one in raised.value.violations] == ["sampling.top_k"]


def test_declared_options_are_those_of_the_api() -> None:
    from service.engines.lmdeploy.sampling import honoured

    assert {field.name for field in fields(Sampling)} == honoured(QWEN3_5)


# Outcomes


def test_every_status_of_lmdeploy_has_an_outcome() -> None:
    from lmdeploy.messages import ResponseType

    from service.engines.lmdeploy.outcomes import OUTCOMES, error_of

    assert set(OUTCOMES) == set(ResponseType)
    going_on = {status for status in ResponseType if error_of(status) is None}
    assert going_on == {ResponseType.SUCCESS, ResponseType.FINISH}
    for status in set(ResponseType) - going_on:
        error = error_of(status)
        assert error is not None
        assert error.reason in REASONS
    for status in (ResponseType.INPUT_LENGTH_ERROR, ResponseType.OUT_OF_MEMORY):
        assert isinstance(error_of(status), ContextTooLong)
    for status in (ResponseType.ENGINE_STOP_ERROR, ResponseType.CANCEL, ResponseType.NO_QUEUE):
        assert isinstance(error_of(status), EngineUnavailable)
    assert isinstance(error_of(ResponseType.INTERNAL_ENGINE_ERROR), InternalError)


def test_an_unknown_status_is_an_error() -> None:
    from service.engines.lmdeploy.outcomes import error_of

    assert isinstance(error_of("new"), InternalError)  # type: ignore[arg-type]


# Settings of the engines


@pytest.mark.parametrize("vision", [True, False])
def test_engine_settings_arrive_one_by_one(vision: bool) -> None:
    from service.engines.lmdeploy.building import pytorch_config, turbomind_config

    options = Options(
        "model", vision=vision, backend="turbomind", dtype="float16", tensor_parallel=2,
        deepstack="off" if vision else "auto", max_batch=7, cache_share=0.3,
        cache_type="int4", prefix_caching=False, prefill_chunk=512,
        model_format="awq",
    )  # fmt: skip
    found = turbomind_config(options, 4096, QWEN3_VL)
    assert (found.dtype, found.tp, found.session_len, found.max_batch_size) == (
        "float16",
        2,
        4097,
        7,
    )
    assert (found.cache_max_entry_count, found.quant_policy) == (0.3, 4)
    assert (found.max_prefill_token_num, found.model_format) == (512, "awq")
    assert found.enable_prefix_caching is False
    assert found.language_model_only is not vision
    other = pytorch_config(
        Options("model", vision=vision, backend="pytorch", tensor_parallel=2, cache_type="fp8"),
        4096,
    )
    assert (other.tp, other.session_len, other.quant_policy) == (2, 4096, 16)
    assert other.language_model_only is not vision


def test_a_session_has_room_after_every_warm_up_prompt_of_turbomind() -> None:
    from service.engines.lmdeploy.building import session_length

    for context in range(16, 10_000):
        for chunk in (context, context + 1, context - 63, 8192):
            length = session_length(context, chunk)
            assert context < length <= context + 6
            assert length % 2 == 1
            assert length not in (chunk, chunk + 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"backend": "vllm"}, {"dtype": "float32"}, {"model_format": "gguf"}, {"cache_type": "int3"},
        {"cache_share": 0.0}, {"cache_share": 1.0}, {"max_batch": 0}, {"tensor_parallel": 0},
        {"prefill_chunk": 0}, {"image_pixels": 0}, {"vision_batch": 0},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Options("model", **changes)


def test_a_machine_without_a_gpu_is_told_what_to_do() -> None:
    from service.engines.lmdeploy.building import _check_machine

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineUnavailable, match="no NVIDIA GPU is visible: check nvidia-smi"):
        _check_machine(Options("model"), SimpleNamespace(num_heads=2))  # type: ignore[arg-type]


def test_tensor_parallel_above_the_number_of_gpus_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from service.engines.lmdeploy import building

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config: Any = SimpleNamespace(num_heads=6)
    with pytest.raises(EngineUnavailable, match="tensor_parallel is 4, but 2 GPUs are visible"):
        building._check_machine(Options("model", tensor_parallel=4), config)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(EngineUnavailable, match="tensor_parallel 4 does not divide the model's 6"):
        building._check_machine(Options("model", tensor_parallel=4), config)


def test_auto_uses_pytorch_if_turbomind_cannot_have_deepstack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import lmdeploy_ext
    from lmdeploy_ext.patch import HostDrift

    installed: list[str | None] = []
    monkeypatch.setattr(lmdeploy_ext, "install", installed.append)
    monkeypatch.setattr(lmdeploy_ext, "uninstall", lambda: None)
    monkeypatch.setattr(lmdeploy_ext, "is_installed", lambda: "off" in installed)
    assert available() == PYTORCH
    for refused in ({"backend": "turbomind"}, {"deepstack": "require"}, {"model_format": "awq"}):
        with pytest.raises(EngineUnavailable, match="cannot be given DeepStack"):
            available(**refused)
    assert set(installed) == {"auto", "require"}
    # Texts do without, and a deliberate choice is one.
    assert available(vision=False) == TURBOMIND
    installed.clear()
    assert available(deepstack="off") == TURBOMIND

    def drift(mode: str | None) -> None:
        raise HostDrift(["LMDeploy 9.9 is not verified"], "Install another.")

    monkeypatch.setattr(lmdeploy_ext, "install", drift)
    with pytest.raises(EngineUnavailable, match=r"9\.9 is not verified"):
        available(backend="turbomind")
    assert available() == PYTORCH


def test_a_failed_self_test_is_a_fallback_and_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    import lmdeploy_ext
    from lmdeploy_ext.deepstack import selftest

    said: list[str] = []
    monkeypatch.setattr(lmdeploy_ext, "install", lambda mode: None)
    monkeypatch.setattr(lmdeploy_ext, "is_installed", lambda: True)
    monkeypatch.setattr(selftest, "verify", lambda: said.append("tested"))
    assert available() == TURBOMIND
    monkeypatch.setattr(selftest, "verify", lambda: "wrong rows")
    assert available() == PYTORCH
    for refused in ({"backend": "turbomind"}, {"deepstack": "require"}):
        with pytest.raises(EngineUnavailable, match="images need: wrong rows"):
            available(**refused)
    assert available(deepstack="off") == TURBOMIND
    assert available(vision=False) == TURBOMIND
    assert said == ["tested"], "not where there are no images"


def available(**options: Any) -> str:
    from service.engines.lmdeploy import building

    return building._available(Options("model", **options), QWEN3_VL, lambda message: None)


def test_details_name_the_mode_and_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmdeploy_ext import deepstack
    from service.engines.lmdeploy import building

    def details(runs: str, active: bool, **options: Any) -> dict[str, str]:
        found = SimpleNamespace(active=active, reason="/opt/module.so lacks a function")
        monkeypatch.setattr(deepstack, "status", lambda: found)
        native = SimpleNamespace(engine_config=None)
        host: Any = SimpleNamespace(backend=runs, native=native, limits_lengths=True)
        config: Any = SimpleNamespace(dtype="bfloat16", family=QWEN3_VL, state_dtype=None)
        return building.describe(host, Options("model", **options), config)

    def shown(found: dict[str, str]) -> list[str]:
        return [found[f"deepstack{end}"] for end in ("", "_mode", "_by")]

    assert shown(details(TURBOMIND, True)) == ["on", "auto", "the hook on TurboMind"]
    off = details(TURBOMIND, False, deepstack="off")
    assert shown(off) == ["off", "off", "nothing"]
    fallback = details(PYTORCH, False)
    assert shown(fallback) == ["on", "auto", "LMDeploy's PyTorch engine"]
    assert "TurboMind cannot be given DeepStack" in fallback["backend_chosen"]
    assert "/opt" not in str(fallback), "no paths to callers"
    chosen = details(PYTORCH, False, backend="pytorch")
    assert chosen["backend_chosen"] == "operator"


# Grammars


@pytest.fixture
def table() -> list[bytes]:
    return [*(bytes([value]) for value in range(256)), b"", b"abc\n", b"\xc0x"]


def test_turbominds_xgrammar_never_gets_bytes_that_are_not_utf8(table: list[bytes]) -> None:
    from service.engines.lmdeploy.guidance import TurboMindCompiler
    from tests.service.engines.lmdeploy.scripted import Module

    made: list[list[bytes]] = []

    class Recording(Module):
        @staticmethod
        def TokenizerInfo(vocab: list[bytes], *rest: Any) -> Any:
            made.append(vocab)
            return Module.TokenizerInfo(vocab, *rest)

    TurboMindCompiler(Recording, table, [256])
    json_table, other = made
    assert other[0xC0] == other[0xF5] == other[258] == b""
    assert other[257] == b"abc\n"
    assert json_table[257] == json_table[0x0A] == b""
    assert json_table[ord("a")] == other[ord("a")] == b"a"


@pytest.mark.parametrize(("cores", "threads"), [(None, 1), (2, 1), (16, 4), (192, 8)])
def test_a_grammar_is_compiled_by_a_part_of_the_cores(
    cores: int | None, threads: int, table: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.engines.lmdeploy.guidance import TurboMindCompiler
    from tests.service.engines.lmdeploy.scripted import Module

    asked: list[int] = []

    class Recording(Module):
        @staticmethod
        def GrammarCompiler(info: Any, threads: int, *rest: Any) -> Any:
            asked.append(threads)
            return Module.GrammarCompiler(info, threads, *rest)

    monkeypatch.setattr("os.cpu_count", lambda: cores)
    compiler = TurboMindCompiler(Recording, table, [256])
    assert asked == [threads, threads]
    assert compiler.compile(analysed(GrammarKind.JSON_SCHEMA, "{}")).size_bytes


def test_an_error_of_the_engines_compiler_is_a_grammar_error(table: list[bytes]) -> None:
    """LMDeploy would go on without the grammar."""
    from service.engines.lmdeploy.guidance import TurboMindCompiler
    from tests.service.engines.lmdeploy.scripted import Module

    class Failing(Module):
        @staticmethod
        def GrammarCompiler(*arguments: Any) -> Any:
            def fail(*_: Any, **__: Any) -> Any:
                raise RuntimeError("[10:00:00] /build/xgrammar/x.cc:1: not today")

            return SimpleNamespace(compile_structural_tag=fail)

    compiler = TurboMindCompiler(Failing, table, [256])
    for kind, source in ((GrammarKind.JSON_SCHEMA, "{}"), (GrammarKind.REGEX, "a")):
        with pytest.raises(GrammarError, match="cannot be compiled: not today") as raised:
            compiler.compile(analysed(kind, source))
        assert "/build" not in raised.value.message


def test_text_for_other_processes_has_no_control_characters(table: list[bytes]) -> None:
    import xgrammar

    from service.engines.lmdeploy.guidance import PyTorchCompiler
    from tests.service.engines.conformance import GRAMMARS

    compiler = PyTorchCompiler(table, [256], as_text=True)
    bounded = analysed(GrammarKind.JSON_SCHEMA, '{"type": "string", "maxLength": 4}')
    text = compiler.compile(bounded).compiled["format"]["grammar"]
    info = xgrammar.TokenizerInfo(table[:257], stop_token_ids=[256])
    compiled = xgrammar.GrammarCompiler(info).compile_grammar(text)
    for answer, fits in (('"ab"', True), ('"a\tb"', False), ('"a\x00"', False), ('"abcde"', False)):
        matcher = xgrammar.GrammarMatcher(compiled)
        assert (matcher.accept_string(answer) and matcher.is_completed()) is fits, answer
    for constraint in GRAMMARS:
        assert compiler.compile(constraint).compiled["type"] == "structural_tag"


def test_the_handover_returns_only_grammars_that_were_added() -> None:
    from lmdeploy._guided_decoding import compile_response_format

    from service.engines.lmdeploy.guidance import Handover

    handover, compiled = Handover(), object()
    response_format = handover.put(3, compiled)
    assert compile_response_format(handover, response_format) is compiled
    handover.drop(3)
    handover.drop(3)
    with pytest.raises(KeyError):
        compile_response_format(handover, response_format)


# Images


def test_images_arrive_as_pixels_spans_and_grids() -> None:
    from lmdeploy.vl.constants import Modality

    from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig, normalise
    from lmdeploy_ext.packing import PackedImage, pack
    from service.engines.lmdeploy.items import multimodal_items

    rng = np.random.default_rng(0)
    images = [
        PackedImage(rng.integers(0, 256, (h * w, 768), dtype=np.uint8), (1, h, w))
        for h, w in ((2, 4), (4, 4))
    ]
    packed = pack([[1, 2], images[0], [3], images[1], [4]], image_token_id=9)
    config = ImageProcessorConfig()
    found = multimodal_items(packed, config, 9, torch.bfloat16)
    assert [item["offset"] for item in found] == [(2, 4), (5, 9)]
    assert [item["image_grid_thw"].tolist() for item in found] == [[1, 2, 4], [1, 4, 4]]
    for item, image in zip(found, images, strict=True):
        assert item["modality"] is Modality.IMAGE
        assert item["image_token_id"] == 9
        expected = torch.from_numpy(normalise(image.patches, config)).to(torch.bfloat16)
        assert torch.equal(item["pixel_values"], expected)
    prints = [item["fingerprint"] for item in found]
    assert len(set(prints)) == 2
    assert {len(one) for one in prints} == {32}
    turned = PackedImage(images[0].patches, (1, 4, 2))
    again = multimodal_items(pack([turned], 9), config, 9, torch.bfloat16)
    assert again[0]["fingerprint"] not in prints, "the grid is part of the image"


def test_the_interface_matches_lmdeploy() -> None:
    """Names and arguments of the PyTorch engine, which cannot be started here."""
    from lmdeploy.pytorch.engine.engine import Engine
    from lmdeploy.pytorch.engine.engine_instance import EngineInstance

    stream = inspect.signature(EngineInstance.async_stream_infer).parameters
    assert {"session_id", "input_ids", "gen_config", "multimodal", "kwargs"} <= stream.keys()
    assert list(inspect.signature(EngineInstance.async_cancel).parameters)[1:] == ["session_id"]
    for name in ("create_instance", "get_health_status", "close", "start_loop", "from_pretrained"):
        assert callable(getattr(Engine, name))
    source = inspect.getsource(Engine.__init__)
    assert "self.max_session_len" in source
    from lmdeploy.pytorch.engine.guided_process import GuidedDecodingManager
    from lmdeploy.pytorch.engine.model_agent import agent

    assert "compile_response_format(self.compiler" in inspect.getsource(
        GuidedDecodingManager.get_processor
    )
    assert "self.guided_decoding_manager = " in inspect.getsource(agent)


def test_limits_of_strings_in_the_masks_of_the_pytorch_engine() -> None:
    """With LMDeploy's own manager of matchers, which the service changes in three places."""
    import numpy as np
    from lmdeploy.pytorch.engine.guided_process import GuidedDecodingManager

    from lmdeploy_ext.lengths.table import Table
    from service.engines.common.grammar import GrammarCompiler, Matcher
    from service.engines.lmdeploy.guidance import Handover, LimitedDecoding
    from service.types import Grammar, GrammarKind
    from tests.lmdeploy_ext.lengths.oracle import STOP, VOCABULARY, string_table

    compiler = GrammarCompiler(VOCABULARY, [STOP])
    grammar = Grammar(
        GrammarKind.JSON_SCHEMA,
        "{}",
        ebnf=r"""root ::= "\"" [^"\\]* "\"" """,
        lengths=string_table(2, 3),
    )
    compiled = compiler.compile(grammar)
    manager = GuidedDecodingManager.__new__(GuidedDecodingManager)
    manager.vocab_size, manager.processors = len(VOCABULARY), {}
    handover = Handover()
    manager.compiler = handover
    LimitedDecoding(manager, handover, VOCABULARY)
    formats = tuple(
        handover.put(session, compiled.automaton, lengths)
        for session, lengths in ((5, Table(grammar.lengths)), (6, None))
    )
    context = [{"session_id": session, "seq_id": session} for session in (5, 6)]
    masks = manager.allocate_batched_bitmap(2)
    matcher = Matcher(compiled, compiler)
    for token in b'"abc':
        processors = manager.get_processors(context, formats)
        masks.fill_(-1)
        for row, processor in processors.items():
            manager.fill_bitmap(processor, masks, row)
        ours = matcher._next_bits()[0]
        assert (masks[0].numpy() & compiler.permitted_json[0] == ours).all()
        assert (masks[1].numpy() & ours == ours).all()
        for processor in processors.values():
            manager.accept_token(processor, token)
        matcher.accept(token)
    (limited, free) = manager.get_processors(context, formats).values()
    for row, processor in enumerate((limited, free)):
        manager.fill_bitmap(processor, masks, row)
    bits = np.unpackbits(masks.numpy().view(np.uint8), axis=1, bitorder="little")
    assert bits[:, ord("d")].tolist() == [0, 1]
    assert bits[:, ord('"')].tolist() == [1, 1]
