"""The small parts of the reference engine, each against an oracle or its rule."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from service.engines.common import grammar as grammar_module
from service.engines.common.detokenizer import Detokenizer, token_bytes
from service.engines.common.grammar import GrammarCompiler, Matcher
from service.engines.common.loops import LoopGuard
from service.engines.reference.cache import Run, RunAllocator
from service.engines.reference.linear import Linear, padded, row_invariant
from service.engines.reference.model import load_model
from service.engines.reference.options import Options
from service.engines.reference.sampler import Sampler
from service.errors import EngineUnavailable, GrammarError, InternalError
from service.types import Grammar, GrammarKind, Sampling
from tests.checkpoints import Shape
from tests.service.analysed import analysed

Write = Callable[[Shape], Path]

# Key-value memory


def test_reserved_runs_never_overlap_and_are_all_released() -> None:
    rng = random.Random(3)
    runs = RunAllocator(300)
    held: list[Run] = []
    for _ in range(3000):
        if held and rng.random() < 0.5:
            runs.release(held.pop(rng.randrange(len(held))))
        else:
            run = runs.reserve(length := rng.randint(1, 60))
            if run is not None:
                assert run.end - run.begin == length
                held.append(run)
        rows = [row for run in held for row in range(run.begin, run.end)]
        assert len(rows) == len(set(rows)) == runs.used
        assert all(0 <= row < 300 for row in rows)
    for run in held:
        runs.release(run)
    assert runs.used == 0
    assert runs.reserve(300) == Run(0, 300)
    assert runs.reserve(1) is None


def test_a_run_that_is_not_reserved_cannot_be_released() -> None:
    with pytest.raises(ValueError, match="not in list"):
        RunAllocator(10).release(Run(0, 3))


# Linear layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 80), (96, 48), (256, 256), (512, 48)])
def test_a_row_is_the_same_in_every_batch(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    if not row_invariant(dtype, torch.device("cpu")):
        pytest.skip("oneDNN's inner product is not available here")
    torch.manual_seed(0)
    linear = Linear(torch.randn(outputs, inputs, dtype=dtype), torch.randn(outputs, dtype=dtype))
    x = torch.randn(300, inputs, dtype=dtype)
    residual = torch.randn(300, outputs, dtype=dtype)
    with torch.inference_mode():
        alone = torch.cat([linear(row[None]) for row in x])
        added = torch.cat([linear.add(x[i : i + 1], residual[i : i + 1]) for i in range(300)])
        for count in (2, 3, 5, 8, 9, 17, 40, 129, 200, 300):
            assert torch.equal(linear(x[:count]), alone[:count]), count
            rows = padded(count)
            if rows <= 300:
                assert torch.equal(linear.add(x[:rows], residual[:rows]), added[:rows]), rows


def test_padded_sizes_are_few() -> None:
    assert all(padded(rows) >= rows for rows in range(1, 2000))
    assert len({padded(rows) for rows in range(1, 513)}) <= 28


# Sampling


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_p=0.8, top_k=20, seed=1),
        Sampling(temperature=1.5, seed=2),
        Sampling(temperature=1.0, top_p=0.3, seed=3),
        Sampling(temperature=0.4, top_k=3, repetition_penalty=1.7, seed=4),
        Sampling(temperature=2.0, top_p=0.999, top_k=400, repetition_penalty=0.5, seed=2**64 - 1),
    ],
)
def test_the_sampler_draws_from_transformers_distribution(sampling: Sampling) -> None:
    torch.manual_seed(sampling.top_k)
    prompt = torch.tensor([3, 3, 9, 77, 120])
    answer: list[int] = []
    sampler = Sampler(sampling, prompt, 512)
    assert sampling.seed is not None
    signed = sampling.seed - 2**64 if sampling.seed >= 2**63 else sampling.seed
    generator = torch.Generator().manual_seed(signed)
    warpers = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    for _ in range(40):
        logits = 3 * torch.randn(512)
        ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.int64)])[None]
        shares = warpers(ids, logits.clone()[None]).softmax(-1)[0]
        expected = int(torch.multinomial(shares, 1, generator=generator))
        sampler.penalise_inplace(logits)
        assert sampler.choose(logits) == expected
        answer.append(expected)


def test_equal_scores_go_to_the_lowest_id() -> None:
    logits = torch.zeros(512)
    logits[[40, 7, 300]] = 1.0
    assert Sampler(Sampling(), torch.tensor([1]), 512).choose(logits) == 7


# Text


def test_no_delta_splits_a_character_and_all_bytes_arrive() -> None:
    table = [bytes([value]) for value in range(256)] + [b""]
    detokenizer = Detokenizer(table)
    text = "aé日本語😀\u2028𝄞 z"
    pieces = [detokenizer.feed(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert detokenizer.feed(256) == ""
    assert detokenizer.finish() == ""


def test_a_character_that_is_cut_at_the_end_is_replaced() -> None:
    detokenizer = Detokenizer([bytes([value]) for value in range(256)])
    assert [detokenizer.feed(byte) for byte in "é😀".encode()[:-1]] == ["", "é", "", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_bytes_of_tokens() -> None:
    vocab = {"a": 0, "Ġcaf": 1, "Ã©": 2, "<|im_end|>": 3, "<think>": 4, "Ċ": 6}
    table = token_bytes(vocab, {3}, 8)
    assert table == (b"a", b" caf", "é".encode(), b"", b"<think>", b"", b"\n", b"")


# Loops


@pytest.mark.parametrize("period", [1, 2, 7, 32])
def test_a_repeating_answer_trips_the_loop_guard(period: int) -> None:
    guard = LoopGuard(window=64, longest=32, interval=8)
    varied = [n * n % 101 + 500 for n in range(200)]
    loop = [n % period for n in range(64)]
    assert guard.trips([*varied, *loop])
    assert not guard.trips([*varied, *loop][:-1]), "only every eighth token"
    assert not guard.trips([*loop, *varied])
    assert not LoopGuard(window=0).trips(loop)


def test_a_long_period_does_not_trip_the_loop_guard() -> None:
    guard = LoopGuard(window=128, longest=32, interval=1)
    assert not guard.trips([n % 33 for n in range(256)])


# Grammars


BYTES = [bytes([value]) for value in range(256)]
STOP = 256


def compiler() -> GrammarCompiler:
    return GrammarCompiler([*BYTES, b"", b""], [STOP])


def allowed(matcher: Matcher) -> set[int]:
    logits = torch.zeros(1, 258)
    matcher.mask_inplace(logits)
    return set(torch.where(logits[0] == 0)[0].tolist())


def follow(matcher: Matcher, text: str) -> None:
    for byte in text.encode():
        assert byte in allowed(matcher), (text, byte)
        matcher.accept(byte)


def test_masks_of_a_choice() -> None:
    made = compiler()
    matcher = Matcher(made.compile(analysed(GrammarKind.CHOICE, '["ab", "ac", "é"]')), made)
    assert allowed(matcher) == {ord("a"), 0xC3}
    assert matcher.forced_text() == ""
    follow(matcher, "a")
    assert allowed(matcher) == {ord("b"), ord("c")}
    assert not matcher.must_stop()
    follow(matcher, "c")
    assert matcher.must_stop()
    assert allowed(matcher) == {STOP}


def test_forced_text_inside_a_character_is_none() -> None:
    made = compiler()
    matcher = Matcher(made.compile(analysed(GrammarKind.CHOICE, '["日本"]')), made)
    assert matcher.forced_text() == "日本"
    matcher.accept("日".encode()[0])
    assert matcher.forced_text() == ""
    for byte in "日".encode()[1:]:
        matcher.accept(byte)
    assert matcher.forced_text() == "本"


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (GrammarKind.EBNF, "root ::= root"),
        (GrammarKind.EBNF, 'root ::= ""'),
        (GrammarKind.EBNF, "root ::= a\na ::= b\nb ::= a"),
        (GrammarKind.REGEX, 'root ::= ""'),
        (GrammarKind.JSON_SCHEMA, "root ::= [\\x01-\\x1f]"),
    ],
)
def test_a_grammar_without_any_text_is_refused(kind: GrammarKind, source: str) -> None:
    with pytest.raises(GrammarError, match="cannot be compiled: "):
        compiler().compile(Grammar(kind, "", source))


DOUBLING = {
    f"d{i}": {
        "type": "array",
        "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2,
        "items": False,
        "minItems": 2,
    }
    for i in range(40)
}
ENDLESS: dict[str, tuple[GrammarKind, object]] = {
    "itself": (GrammarKind.EBNF, 'root ::= "ab" root'),
    "doubling": (
        GrammarKind.JSON_SCHEMA,
        {"$ref": "#/$defs/d0", "$defs": {**DOUBLING, "d40": {"type": "null"}}},
    ),
    "items": (
        GrammarKind.JSON_SCHEMA,
        {"type": "array", "minItems": 10**7, "items": {"const": "the same again"}},
    ),
    "rules": (
        GrammarKind.EBNF,
        "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(40)) + '\nr40 ::= "a"\nroot ::= r0',
    ),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_forced_text_is_never_computed(name: str) -> None:
    """xgrammar would, with all the memory there is."""
    kind, source = ENDLESS[name]
    made = compiler()
    text = source if isinstance(source, str) else json.dumps(source)
    matcher = Matcher(made.compile(analysed(kind, text)), made)
    for _ in range(5):
        assert matcher.forced_text() == ""
        matcher.accept(min(allowed(matcher)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        'root ::= (("a"{0,100}){0,100}){0,100}',
        'root ::= ("a" | root){0,100}',
    ],
)
def test_a_slow_token_ends_the_answer_as_too_costly(source: str) -> None:
    """xgrammar follows every way to read the text: their number grows without end."""
    made = compiler()
    matcher = Matcher(made.compile(analysed(GrammarKind.EBNF, source)), made)
    with pytest.raises(GrammarError, match="too many ways") as caught:
        follow(matcher, "a" * 100)
    assert caught.value.reason == "GRAMMAR_TOO_COSTLY"


def test_the_total_matching_time_of_an_answer_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "STEP_LIMIT_S", 1e9)
    monkeypatch.setattr(grammar_module, "ANSWER_LIMIT_S", 0.01)
    made = compiler()
    source = 'root ::= (("a"{0,20}){0,20}){0,20}'
    matcher = Matcher(made.compile(analysed(GrammarKind.EBNF, source)), made)
    with pytest.raises(GrammarError, match="too many ways"):
        follow(matcher, "a" * 100)


@pytest.mark.parametrize("limit", ["MASK_LIMIT_S", "MASKS_LIMIT_S"])
def test_the_time_of_masks_is_bounded(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """A count that is large is work for each token of the vocabulary."""
    made = compiler()
    source = 'root ::= one{1000000000,}\none ::= [ -~] | "\\n" [ -~]'
    compiled = made.compile(analysed(GrammarKind.EBNF, source))
    follow(Matcher(compiled, made), "a" * 50)
    monkeypatch.setattr(grammar_module, limit, 0.0)
    with pytest.raises(GrammarError, match="large counts") as caught:
        follow(Matcher(compiled, made), "a" * 50)
    assert caught.value.reason == "GRAMMAR_TOO_COSTLY"


def test_a_token_that_the_grammar_refuses_is_an_error() -> None:
    made = compiler()
    matcher = Matcher(made.compile(analysed(GrammarKind.REGEX, "[a-c]+")), made)
    with pytest.raises(InternalError, match="refused token"):
        matcher.accept(ord("d"))


def test_logits_of_another_width_are_an_error() -> None:
    made = compiler()
    matcher = Matcher(made.compile(analysed(GrammarKind.REGEX, "[a-c]+")), made)
    with pytest.raises(InternalError, match="width 300"):
        matcher.mask_inplace(torch.zeros(1, 300))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "string", "maxLength": 9},
        {"type": "string", "minLength": 2},
        {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    ],
)
def test_masks_forbid_control_characters_in_json(schema: object) -> None:
    made = compiler()
    source = json.dumps(schema)
    matcher = Matcher(made.compile(analysed(GrammarKind.JSON_SCHEMA, source)), made)
    follow(matcher, '"x' if schema["type"] == "string" else '["x')  # type: ignore[index]
    assert not allowed(matcher) & set(range(0x20))
    assert ord("y") in allowed(matcher)


def test_whitespace_is_that_of_json_dumps() -> None:
    made = compiler()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "null"}},
              "required": ["a", "b"]}  # fmt: skip
    matcher = Matcher(made.compile(analysed(GrammarKind.JSON_SCHEMA, json.dumps(schema))), made)
    follow(matcher, json.dumps({"a": 12, "b": None}))
    assert STOP in allowed(matcher)


def test_compiling_a_grammar_without_analysis_is_an_internal_error() -> None:
    with pytest.raises(InternalError, match="not analysed"):
        compiler().compile(Grammar(GrammarKind.REGEX, "a+"))


def test_a_refusal_shows_the_cause_and_no_path() -> None:
    with pytest.raises(GrammarError) as raised:
        compiler().compile(analysed(GrammarKind.EBNF, 'root ::= "a'))
    assert "ebnf cannot be compiled" in raised.value.message
    assert not any(part in raised.value.message for part in (".cc", ".h:", "/"))


# Checkpoints that cannot be used


def copied(folder: Path, into: Path) -> Path:
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    return into


def with_config(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def text_entry(name: str, value: object) -> Callable[[dict[str, object]], None]:
    return lambda content: content["text_config"].update({name: value})  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(architectures=["LlamaForCausalLM"]),
            "architecture is LlamaForCausalLM",
        ),
        (lambda c: c.update(quantization_config={"bits": 8}), "the weights are quantised"),
        (lambda c: c.pop("text_config"), "no text_config"),
        (lambda c: c.pop("image_token_id"), "'image_token_id' is missing"),
        (lambda c: c.update(image_token_id=None), "cannot be loaded"),
        (text_entry("hidden_act", "gelu"), "hidden_act 'gelu'"),
        (text_entry("hidden_size", 64), "wrong shape"),
        (text_entry("num_hidden_layers", 5), "missing: "),
        (text_entry("num_hidden_layers", 3), "unexpected: "),
        (text_entry("rope_parameters", {"rope_type": "yarn"}), "rope type 'yarn'"),
        (text_entry("max_position_embeddings", 10), "context_length 64 exceeds"),
    ],
)
def test_unsupported_values_of_config_json_are_refused(
    checkpoint: Write, tmp_path: Path, change: Callable[[dict[str, object]], None], message: str
) -> None:
    folder = copied(checkpoint(Shape()), tmp_path / "model")
    with_config(folder, change)
    with pytest.raises(EngineUnavailable) as raised:
        load_model(folder, Options(folder, context_length=64, threads=1), lambda text: None)
    assert message in raised.value.message
    assert str(tmp_path) not in raised.value.message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"not safetensors", "model.safetensors cannot be read"),
        ("model.safetensors", None, "neither model.safetensors.index.json nor model.safetensors"),
        ("config.json", b"{", "config.json is not valid JSON"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", b"{", "tokenizer.json cannot be read"),
        ("preprocessor_config.json", None, "no preprocessor_config.json"),
    ],
)
def test_missing_and_broken_files_are_named(
    checkpoint: Write, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    folder = copied(checkpoint(Shape()), tmp_path / "model")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(EngineUnavailable) as raised:
        load_model(folder, Options(folder, threads=1), lambda text: None)
    assert message in raised.value.message
    assert str(tmp_path) not in raised.value.message


def test_weights_in_shards(checkpoint: Write, tmp_path: Path) -> None:
    folder = copied(checkpoint(Shape()), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"shard-{index % 3}.safetensors" for index, name in enumerate(names)}
    for shard in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == shard}
        save_file(part, folder / shard, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    load_model(folder, Options(folder, threads=1), lambda text: None)
    (folder / "shard-1.safetensors").unlink()
    with pytest.raises(EngineUnavailable, match="shard-1"):
        load_model(folder, Options(folder, threads=1), lambda text: None)


@pytest.mark.parametrize(
    ("instructions", "dtype"),
    [
        ({}, torch.float32),  # this torch cannot tell
        ({"_is_amx_tile_supported": False, "_is_avx512_bf16_supported": False}, torch.float32),
        ({"_is_amx_tile_supported": True, "_is_avx512_bf16_supported": False}, torch.bfloat16),
        ({"_is_amx_tile_supported": False, "_is_avx512_bf16_supported": True}, torch.bfloat16),
    ],
)
def test_auto_dtype_follows_the_processor(
    checkpoint: Write,
    monkeypatch: pytest.MonkeyPatch,
    instructions: dict[str, bool],
    dtype: torch.dtype,
) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    for name, present in instructions.items():
        monkeypatch.setattr(torch.cpu, name, lambda present=present: present, raising=False)
    folder = checkpoint(Shape(dtype=torch.bfloat16))
    model = load_model(folder, Options(folder, device="cpu", threads=1), lambda text: None)
    assert model.decoder.dtype is dtype


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"max_batch\n.*greater than or equal to 1"):
        Options("model", max_batch=0)
