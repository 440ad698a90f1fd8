"""Settings: where they come from, what is refused, and that the refusal names the setting."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from service.cli import settings_help
from service.cli.arguments import read_settings
from service.engines.lmdeploy import LMDeployEngine
from service.engines.lmdeploy.options import LMDeploySettings
from service.engines.reference.options import ReferenceSettings
from service.quotas import Quota
from service.settings import (
    MIB,
    Settings,
    SettingsError,
    load_settings,
    misspelt,
)
from service.wiring import build_engine, build_pool


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"QWEN3VL_{name.upper()}", raising=False)


def refused(**values: Any) -> str:
    with pytest.raises(SettingsError) as found:
        load_settings(**values)
    return str(found.value)


def from_flags(*flags: str) -> Settings:
    """As `qwen3vl serve` reads its arguments."""
    return load_settings(
        _cli_parse_args=list(flags), _cli_kebab_case=True, _cli_implicit_flags=True
    )


# Where they come from


def test_the_defaults_are_valid_together() -> None:
    settings = load_settings()
    assert settings.loopback
    assert not settings.tls
    assert not settings.authenticated
    assert settings.address == "127.0.0.1:50051"
    assert settings.max_message_bytes == 64 * MIB


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3VL_PORT", "1234")
    monkeypatch.setenv("qwen3vl_max_queue", "7")
    monkeypatch.setenv("QWEN3VL_REFLECTION", "false")
    monkeypatch.setenv("QWEN3VL_DRAIN_GRACE_S", "2.5")
    settings = load_settings()
    assert (settings.port, settings.max_queue) == (1234, 7)
    assert (settings.reflection, settings.drain_grace_s) == (False, 2.5)


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3VL_PORT", "1234")
    monkeypatch.setenv("QWEN3VL_MAX_QUEUE", "7")
    settings = from_flags("--port", "4321", "--max-batch=3", "--no-reflection")
    assert (settings.port, settings.max_queue, settings.max_batch) == (4321, 7, 3)
    assert not settings.reflection


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3VL_PORT", "many")
    assert refused().startswith("port: ")


def test_a_misspelt_variable_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QWEN3VL_API_KEY_FILE", "/keys")
    load_settings()
    assert caplog.record_tuples == [
        (
            "service.settings",
            logging.WARNING,
            "QWEN3VL_API_KEY_FILE is not a setting and has no effect; "
            "did you mean QWEN3VL_API_KEYS_FILE?",
        )
    ]


def test_variables_of_others_are_left_alone() -> None:
    ours = ["QWEN3VL_PORT", "QWEN3VL_API_KEY", "QWEN3VL_SERVER", "QWEN3VL_CA"]
    cluster = ["QWEN3VL_SERVICE_HOST", "QWEN3VL_PORT_50051_TCP_ADDR", "HOME", "MAX_BATCHES"]
    assert misspelt([*ours, *cluster]) == []
    assert misspelt(["qwen3vl_max_batchs"]) == [("qwen3vl_max_batchs", "QWEN3VL_MAX_BATCH")]


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().port = 1


def test_every_setting_says_what_it_is() -> None:
    silent = [name for name, field in Settings.model_fields.items() if not field.description]
    assert silent == []


def test_the_old_name_of_a_setting_works_and_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QWEN3VL_ENGINE", "lmdeploy")
    monkeypatch.setenv("QWEN3VL_PICTURE_PIXELS", "4096")
    settings: Any = load_settings()
    assert settings.image_pixels == 4096
    assert caplog.messages == ["QWEN3VL_PICTURE_PIXELS is now called QWEN3VL_IMAGE_PIXELS"]
    assert load_settings(image_pixels=2048).engine_settings.image_pixels == 2048  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [["--picture-pixels", "4096"], ["--picture-pixels=4096"]])
def test_the_old_name_of_a_flag_works_and_warns(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings: Any = read_settings("serve", ["--engine=lmdeploy", *arguments])
    assert settings.image_pixels == 4096
    assert capsys.readouterr().err == "--picture-pixels is now called --image-pixels.\n"


@pytest.mark.parametrize(("engine", "batch"), [("reference", 16), ("lmdeploy", 64)])
def test_a_default_is_that_of_the_engine(engine: str, batch: int) -> None:
    assert load_settings(engine=engine).engine_settings.max_batch == batch  # type: ignore[attr-defined]
    assert load_settings(engine=engine, max_batch=3).engine_settings.max_batch == 3  # type: ignore[attr-defined]
    assert "16 with reference, 64 with lmdeploy" in str(Settings.model_fields["max_batch"])


def test_the_engine_without_a_model_is_not_offered() -> None:
    assert load_settings(engine="fake").engine == "fake"
    assert (
        refused(engine="fast")
        == "engine: there is no engine 'fast'; there are reference, lmdeploy, remote, ray"
    )


# Ranges

OUTSIDE = [
    ("port", -1),
    ("port", 65_536),
    ("engine", "fast"),
    ("model", ""),
    ("dtype", "int8"),
    ("backend", "vllm"),
    ("remote_url", "127.0.0.1:8000"),
    ("remote_url", "ftp://127.0.0.1"),
    ("remote_url", "http://user:secret@host"),
    ("remote_url", "http://host:99999"),
    ("remote_url", "http://host/v1?key=secret"),
    ("remote_url", "grpc://host"),
    ("remote_kind", "openai"),
    ("remote_model", ""),
    ("remote_connect_s", 0),
    ("remote_connect_s", float("inf")),
    ("remote_silence_s", 0),
    ("remote_start_s", -1),
    ("remote_connections", 0),
    ("remote_retries", -1),
    ("remote_retries", 11),
    ("remote_min_pixels", 1023),
    ("remote_min_pixels", 16_777_217),
    ("remote_max_pixels", 1023),
    ("remote_max_pixels", 16_777_217),
    ("remote_ca", "/nowhere.pem"),
    ("ray_engine", "remote"),
    ("ray_name", "a b"),
    ("ray_address", ""),
    ("ray_replicas", 0),
    ("ray_replicas", 1025),
    ("ray_max_replicas", 0),
    ("ray_max_replicas", 1025),
    ("ray_gpus", -1),
    ("ray_gpus", 65),
    ("ray_cpus", -1),
    ("ray_cpus", 1025),
    ("ray_ongoing", 0),
    ("ray_ongoing", 65537),
    ("ray_target_ongoing", 0),
    ("ray_text_delay_s", -1),
    ("ray_text_delay_s", 11),
    ("ray_start_s", 0),
    ("ray_linger_s", -1),
    ("ray_store_bytes", 1024),
    ("tensor_parallel", 0),
    ("tensor_parallel", 65),
    ("model_format", "gguf"),
    ("cache_share", 0),
    ("cache_share", 1),
    ("cache_share", float("nan")),
    ("cache_type", "int3"),
    ("prefill_chunk", 63),
    ("image_pixels", 1023),
    ("vision_batch", 0),
    ("device", "gpu"),
    ("threads", 0),
    ("max_batch", 0),
    ("max_batch", 1025),
    ("context_length", 15),
    ("max_images", 0),
    ("max_image_bytes", 0),
    ("max_image_pixels", 0),
    ("jpeg_scaled_pixels", 999_999),
    ("max_message_bytes", 2**31),
    ("max_request_pixels", 0),
    ("max_encoded_bytes", MIB - 1),
    ("max_decoding_bytes", 64 * MIB - 1),
    ("max_text_bytes", 0),
    ("max_schema_bytes", 0),
    ("max_schema_depth", 0),
    ("max_regex_length", 0),
    ("compile_timeout_s", 0),
    ("compile_workers", 0),
    ("compile_workers", 65),
    ("grammar_cache_bytes", 0),
    ("http_port", -1),
    ("http_port", 65_536),
    ("admin_port", -1),
    ("admin_port", 65_536),
    ("output_retries", -1),
    ("output_retries", 6),
    ("max_concurrent", 0),
    ("max_queue", -1),
    ("inference_timeout_s", 0),
    ("inference_timeout_s", float("nan")),
    ("inference_timeout_s", float("inf")),
    ("receive_timeout_s", 0),
    ("image_fetch_timeout_s", 0),
    ("health_interval_s", -1),
    ("unhealthy_exit_s", 0),
    ("max_connections", 0),
    ("max_streams", 0),
    ("read_ahead_bytes", 100),
    ("max_connection_idle_s", -1),
    ("max_connection_age_s", 86_401),
    ("event_loop", "other"),
    ("log_level", "loud"),
    ("log_format", "xml"),
    ("log_every", 0),
    ("drain_grace_s", -1),
    ("drain_grace_s", 86_401),
    ("key_concurrent", 0),
    ("key_queue", -1),
    ("key_requests_per_minute", 0),
    ("key_megapixels_per_minute", 0),
    ("key_tokens_per_minute", 0),
]


@pytest.mark.parametrize(("name", "value"), OUTSIDE, ids=lambda value: str(value))
def test_out_of_range(name: str, value: object) -> None:
    text = refused(**{name: value})
    assert text.startswith(f"{name}: ")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("image_formats", "jpeg,gif", "there is no format 'gif'; there are jpeg, png, webp, heic"),
        ("image_formats", "", "there is no format ''"),
        ("image_background", "white", "image_background: "),
        ("image_background", "#fff", "image_background: "),
        ("jpeg_scaled_pixels", 64_000_001, "must be at most max_image_pixels, 64000000"),
    ],
)
def test_wrong_settings_of_images(name: str, value: object, words: str) -> None:
    text = refused(**{name: value})
    assert text.startswith(f"{name}: ")
    assert words in text


def test_uvloop_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused(event_loop="uvloop") == (
        "event_loop: uvloop is not installed: pip install 'qwen3vl-grpc[uvloop]'"
    )


def test_heic_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused(image_formats="jpeg,heic") == (
        "image_formats: heic needs the extra heif: pip install 'qwen3vl-grpc[heif]'"
    )


def test_settings_of_images() -> None:
    settings = load_settings(image_formats="PNG, webp", image_background="#0A80ff")
    assert settings.accepted_formats == ("PNG", "WebP")
    assert settings.background_rgb == (10, 128, 255)
    assert load_settings().accepted_formats == ("JPEG", "PNG", "WebP")


def test_every_number_has_a_range_that_is_tested() -> None:
    numbers = {
        name
        for name, field in Settings.model_fields.items()
        if any(kind in str(field.annotation) for kind in ("int", "float"))
    }
    assert numbers <= {name for name, _ in OUTSIDE}


def test_all_wrong_settings_are_named_at_once() -> None:
    lines = refused(port=-1, max_batch=0, engine="fast").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["port", "engine", "max_batch"]


def test_an_unknown_setting_is_refused() -> None:
    assert refused(max_batchs=3).startswith("max_batchs: ")


def test_an_unlimited_queue_of_nothing_is_allowed() -> None:
    assert load_settings(max_queue=0, drain_grace_s=0, port=0).max_queue == 0


# Combinations


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("")
    return path


LMDEPLOY = {"engine": "lmdeploy", "model": "some/checkpoint"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": "float32"}, "dtype: LMDeploy computes in bfloat16 or float16"),
        ({"device": "cpu"}, "device: LMDeploy takes the first GPUs that it sees"),
        ({"device": "cuda:1"}, "device: LMDeploy takes the first GPUs that it sees"),
        ({"threads": 2}, "threads: is a setting of engine=reference"),
    ],
)
def test_unsupported_settings_of_lmdeploy_are_refused(changes: dict[str, Any], says: str) -> None:
    load_settings(**LMDEPLOY)
    assert refused(**{**LMDEPLOY, **changes}).startswith(says)


ONLY_LMDEPLOY: list[tuple[str, object]] = [
    ("backend", "auto"),
    ("deepstack", "auto"),
    ("string_lengths", "off"),
    ("tensor_parallel", 1),
    ("model_format", "auto"),
    ("cache_share", 0.5),
    ("cache_type", "none"),
    ("prefix_caching", True),
    ("prefill_chunk", 4096),
    ("image_pixels", 4096),
    ("vision_batch", 1),
]


@pytest.mark.parametrize(("name", "value"), ONLY_LMDEPLOY)
@pytest.mark.parametrize("engine", ["reference", "fake"])
def test_settings_of_lmdeploy_are_refused_elsewhere(engine: str, name: str, value: object) -> None:
    assert refused(engine=engine, **{name: value}) == f"{name}: is a setting of engine=lmdeploy"
    assert getattr(load_settings(**LMDEPLOY, **{name: value}), name) == value


def test_every_setting_of_lmdeploy_is_in_the_list_of_refusals() -> None:
    only = LMDeploySettings.model_fields.keys() - ReferenceSettings.model_fields.keys()
    assert only == {name for name, _ in ONLY_LMDEPLOY}
    assert Settings.model_fields.keys() > only
    assert refused(dtype="float16").startswith("dtype: float16 is a type of engine=lmdeploy")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backend": "turbomind", "cache_type": "fp8"}, "cache_type: TurboMind has no fp8"),
        ({"vision": False, "cache_type": "fp8"}, "cache_type: TurboMind has no fp8"),
        (
            {"backend": "pytorch", "model_format": "awq"},
            "model_format: LMDeploy's PyTorch engine reads the format",
        ),
        ({"backend": "pytorch", "deepstack": "off"}, "deepstack: LMDeploy's PyTorch engine always"),
        (
            {"backend": "turbomind", "tensor_parallel": 2},
            "tensor_parallel: TurboMind has DeepStack on one GPU only",
        ),
        ({"vision": False, "vision_batch": 4}, "vision_batch: there are no images"),
        ({"vision": False, "image_pixels": 4096}, "image_pixels: there are no images"),
        ({"vision": False, "deepstack": "require"}, "deepstack: there are no images"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_with_the_reason(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(SettingsError) as found:
        build_engine(load_settings(**LMDEPLOY, **changes))
    assert str(found.value).startswith(says)


@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({}, "turbomind"),
        ({"tensor_parallel": 2}, "pytorch"),
        ({"tensor_parallel": 2, "vision": False}, "turbomind"),
        ({"tensor_parallel": 2, "deepstack": "off"}, "turbomind"),
        ({"backend": "pytorch"}, "pytorch"),
    ],
)
def test_auto_takes_turbomind_where_it_has_deepstack_or_needs_none(
    changes: dict[str, Any], backend: str
) -> None:
    engine = build_engine(load_settings(**LMDEPLOY, **changes))
    assert isinstance(engine, LMDeployEngine)
    assert engine._options.chosen_backend == backend


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tls_cert"}, "tls_key: tls_cert and tls_key belong together"),
        ({"tls_key"}, "tls_cert: tls_cert and tls_key belong together"),
        ({"tls_client_ca"}, "tls_client_ca: needs tls_cert and tls_key"),
    ],
)
def test_tls_cert_and_key_need_each_other(file: Path, given: set[str], says: str) -> None:
    assert refused(**dict.fromkeys(given, file)).startswith(says)


@pytest.mark.parametrize("name", ["tls_client_ca", "api_keys_file", "tasks_dir"])
def test_paths_that_are_not_there(tmp_path: Path, file: Path, name: str) -> None:
    values = {"tls_cert": file, "tls_key": file, name: tmp_path / "nothing"}
    assert refused(**values).startswith(f"{name}: there is no f")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_beyond_loopback_needs_tls_and_keys(file: Path, host: str) -> None:
    tls = {"tls_cert": file, "tls_key": file}
    for values in ({}, tls, {"api_keys_file": file}):
        text = refused(host=host, **values)
        assert text.startswith(f"host: {host} can be reached from other machines")
        assert "insecure=true" in text
    assert load_settings(host=host, **tls, api_keys_file=file).authenticated
    assert load_settings(host=host, **tls, tls_client_ca=file).authenticated
    assert load_settings(host=host, insecure=True).host == host


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("localhost", "localhost:50051"),
        ("127.0.0.53", "127.0.0.53:50051"),
        ("::1", "[::1]:50051"),
        ("[::1]", "[::1]:50051"),
    ],
)
def test_loopback_in_its_forms(host: str, address: str) -> None:
    settings = load_settings(host=host)
    assert settings.loopback
    assert settings.address == address


def test_slots_follow_what_the_engine_decodes_together() -> None:
    assert Settings().slots == 24
    assert Settings(max_batch=1).slots == 2
    assert Settings(engine="lmdeploy", model="org/model", max_batch=100).slots == 150
    assert Settings(max_batch=2, max_concurrent=7).slots == 7
    assert Settings(engine="fake").slots == 64


def test_quotas_need_callers_that_are_known(file: Path) -> None:
    assert refused(key_queue=1).startswith("key_queue: needs api_keys_file or tls_client_ca")
    settings = load_settings(key_queue=1, api_keys_file=file)
    assert settings.quota == Quota(queue=1)


def test_a_message_has_room_for_the_largest_image() -> None:
    text = refused(max_image_bytes=10 * MIB, max_message_bytes=10 * MIB)
    assert text.startswith("max_message_bytes: must be at least max_image_bytes plus")
    assert load_settings(max_image_bytes=10 * MIB, max_message_bytes=11 * MIB).max_images == 64


def test_one_image_within_its_limits_fits_into_those_of_all() -> None:
    text = refused(max_image_pixels=1000, max_request_pixels=999)
    assert text == "max_request_pixels: must be at least max_image_pixels, 1000"
    text = refused(max_image_bytes=5 * MIB, max_encoded_bytes=4 * MIB)
    assert text == f"max_encoded_bytes: must be at least max_image_bytes, {5 * MIB}"


@pytest.mark.parametrize("engine", ["reference", "lmdeploy"])
def test_the_bound_of_compiled_grammars_reaches_the_engine(engine: str) -> None:
    own = build_engine(load_settings(engine=engine))
    told = build_engine(load_settings(engine=engine, grammar_cache_bytes=12345))
    assert own._options.grammar_cache_bytes > 2**20  # type: ignore[attr-defined]
    assert told._options.grammar_cache_bytes == 12345  # type: ignore[attr-defined]


def test_limits_of_analysis_reach_the_pool() -> None:
    pool = build_pool(load_settings(compile_workers=3, compile_timeout_s=0.5))
    assert (pool._count, pool._timeout_s) == (3, 0.5)


@pytest.mark.parametrize("missing", ["tls", "keys"])
def test_http_beyond_loopback_needs_tls_and_keys(tmp_path: Path, missing: str) -> None:
    given = {name: tmp_path / name for name in ("tls_cert", "tls_key", "api_keys_file")}
    for path in given.values():
        path.touch()
    everywhere = {"http_port": 8000, "http_host": "0.0.0.0"}
    assert load_settings(**everywhere, **given).http_port == 8000
    assert load_settings(**everywhere, insecure=True).http_port == 8000
    for name in ("tls_cert", "tls_key") if missing == "tls" else ("api_keys_file",):
        del given[name]
    assert refused(**everywhere, **given).startswith("http_host: 0.0.0.0 can be reached")


def test_uvloop_serves_http_without_tls_alone(tmp_path: Path) -> None:
    given = {name: tmp_path / name for name in ("tls_cert", "tls_key")}
    for path in given.values():
        path.touch()
    assert load_settings(event_loop="uvloop", http_port=8000).http_port == 8000
    assert load_settings(event_loop="uvloop", **given).tls
    assert refused(event_loop="uvloop", http_port=8000, **given).startswith(
        "event_loop: uvloop cannot encrypt the HTTP API"
    )


def test_http_needs_keys_where_grpc_needs_client_certificates(tmp_path: Path) -> None:
    given = {name: tmp_path / name for name in ("tls_cert", "tls_key", "tls_client_ca")}
    for path in given.values():
        path.touch()
    assert refused(http_port=8000, **given).startswith("http_port: HTTP asks for no client")
    assert load_settings(http_port=8000, insecure=True, **given).http_port == 8000


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (1024, "1024 (1 KiB)"),
        (64 * 1024, "65536 (64 KiB)"),
        (1024**2 - 1024, "1047552 (1023 KiB)"),
        (1024**2, "1048576 (1 MiB)"),
        (20 * 1024**2, "20971520 (20 MiB)"),
        (None, None),
    ],
)
def test_the_help_shows_bytes_in_a_larger_unit(size: int | None, shown: str | None) -> None:
    assert settings_help._shown("max_any_bytes", size) == shown
    assert settings_help._shown("max_any", size) == size
