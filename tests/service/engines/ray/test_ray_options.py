"""The settings of the Ray engine."""

from __future__ import annotations

import pickle
import socket
from pathlib import Path
from typing import Any

import pytest

from service import __version__
from service.engines.fake import FakeEngine
from service.engines.lmdeploy.options import LMDeploySettings
from service.engines.ray import RayEngine, RaySettings
from service.engines.ray import plan as plans
from service.engines.ray.cluster import MISSING, ClusterOptions, Connection
from service.engines.ray.plan import PACKAGE, BundledPath, Plan, portable
from service.engines.reference.options import ReferenceSettings
from service.errors import EngineUnavailable
from service.settings import Settings, SettingsError, load_settings
from service.wiring import build_engine


def loaded(**values: Any) -> Settings:
    return load_settings(engine="ray", **values)


def settings(**values: Any) -> RaySettings:
    found = loaded(**values).engine_settings
    assert isinstance(found, RaySettings)
    return found


def plan(**values: Any) -> Plan:
    engine = build_engine(loaded(**values))
    assert isinstance(engine, RayEngine)
    return engine._plan


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"ray_engine": "remote"},
            "ray_engine: replicas can run reference, lmdeploy, not 'remote'",
        ),
        ({"ray_name": "a/b"}, "ray_name: needs 1 to 64 letters"),
        ({"ray_gpus": 1.5}, "ray_gpus: more than one GPU must be a whole number"),
        ({"ray_replicas": 3, "ray_max_replicas": 2}, "ray_max_replicas: must be at least"),
        ({"ray_target_ongoing": 3}, "ray_target_ongoing: has no effect without ray_max_replicas"),
        ({"ray_linger_s": 3}, "ray_linger_s: has no effect without ray_address"),
        ({"ray_address": "auto", "ray_store_bytes": 2**28}, "ray_store_bytes: is set where"),
        ({"cache_share": 0.5}, "cache_share: is not a setting of ray_engine=reference"),
        ({"ray_engine": "lmdeploy", "device": "cpu"}, "device: LMDeploy takes the first GPUs"),
        ({"ray_engine": "lmdeploy", "dtype": "float32"}, "dtype: LMDeploy computes in bfloat16"),
        ({"max_batch": 0}, "max_batch: "),
        ({"remote_url": "http://a"}, "remote_url: is a setting of engine=remote"),
    ],
)
def test_wrong_settings_name_the_setting(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as raised:
        loaded(**values)
    assert words in str(raised.value)


def test_settings_reach_the_engine_of_the_replicas() -> None:
    inner = settings(max_batch=3, threads=2, vision=False).inner_settings()
    assert inner == ReferenceSettings(max_batch=3, threads=2, vision=False)
    inner = settings(ray_engine="lmdeploy", cache_share=0.5).inner_settings()
    assert inner == LMDeploySettings(cache_share=0.5)


def test_the_settings_of_ray_belong_to_it_alone() -> None:
    with pytest.raises(SettingsError, match="ray_replicas: is a setting of engine=ray"):
        load_settings(ray_replicas=2)


def test_slots_and_requests_follow_the_replicas() -> None:
    assert settings(max_batch=8).ongoing == 12
    assert settings(ray_engine="fake").ongoing == 64
    assert settings(ray_ongoing=5).ongoing == 5
    assert settings(max_batch=8, ray_max_replicas=2).target_ongoing == 8
    assert loaded(max_batch=8, ray_replicas=4).slots == 48
    assert loaded(max_batch=8, ray_replicas=4, ray_max_replicas=6).slots == 72


def test_gpus_follow_the_engine() -> None:
    assert settings().gpus == 0
    assert settings(device="cuda").gpus == 1
    assert settings(ray_engine="lmdeploy").gpus == 1
    assert settings(ray_engine="lmdeploy", tensor_parallel=4).gpus == 4
    assert settings(ray_engine="lmdeploy", ray_gpus=0.5).gpus == 0.5


def test_a_plan_crosses_and_finds_the_bundled_model_there() -> None:
    found = pickle.loads(pickle.dumps(plan(ray_engine="fake")))
    assert isinstance(found.build(), FakeEngine)
    assert found.build.model == BundledPath("bundled/drawings")
    assert (found.build.model.here() / "config.json").is_file()


def test_models_elsewhere_keep_their_names(tmp_path: Path) -> None:
    assert portable("Qwen/Qwen3-VL-2B-Instruct") == "Qwen/Qwen3-VL-2B-Instruct"
    assert portable(tmp_path) == str(tmp_path)
    assert portable(PACKAGE / "bundled") == BundledPath("bundled")


def test_plans_differ_by_the_names_of_settings() -> None:
    one = plan(max_batch=8)
    assert one.differences(plan(max_batch=8)) == ""
    assert one.differences(plan(max_batch=9)) == (
        "max_batch (running: 8, here: 9), ray_ongoing (running: 12, here: 13), "
        "ray_target_ongoing (running: 8.0, here: 8.666666666666666)"
    )
    assert "model (running: bundled/drawings, here: Qwen/" in one.differences(
        plan(max_batch=8, model="Qwen/Qwen3-VL-2B-Instruct")
    )


def test_plans_differ_by_limits_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    one = plan(max_images=3)
    assert one.differences(plan(max_images=4)) == "max_images (running: 3, here: 4)"
    agreed = dict(one.agreed)
    monkeypatch.setattr(plans, "__version__", "0.0.1")
    assert one.agreed == {**agreed, "version": "0.0.1"}
    assert agreed["version"] == __version__


def test_without_ray_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(EngineUnavailable) as raised:
        Connection().open(ClusterOptions())
    assert raised.value.message.startswith(MISSING.partition(" Missing")[0])


@pytest.mark.slow  # imports all of Ray
@pytest.mark.filterwarnings("ignore")  # Ray's own, at its import
def test_an_address_where_nothing_listens_is_an_error() -> None:
    """Ray alone tries for minutes, without a word."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EngineUnavailable, match=rf"Ray at {address} cannot be used: .*refused"):
            Connection()._connect(ClusterOptions(address))
