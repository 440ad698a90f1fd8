"""deploy/: the manifests are valid, and every command, port, page and setting in them exists in the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.cli.arguments import read_settings
from service.runtime import CLOSE_LIMIT_S, EXIT_LIMIT_S
from service.settings import Settings
from tests.service.admin_pages import page
from tests.service.harness import running
from tests.service.test_metrics import METRICS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FOLDERS = ["base", "overlays/one-gpu", "overlays/several-gpus", "overlays/gateway"]
KUBERNETES = ("1.31", "1.37")
"""The oldest version that the manifests are for (the sleep of preStop), and a new one."""
FOREIGN = {"GRPCRoute", "BackendTLSPolicy"}
"""Kinds of the Gateway API, of which Kubernetes has no schema."""
SECRETS = {"tls.crt", "tls.key", "keys"}


def tool(name: str) -> str:
    """A command of the environment of the tests, or of the system."""
    place = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    found = shutil.which(name, path=place)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@cache
def built(folder: str) -> tuple[dict[str, Any], ...]:
    """The manifests of a folder, as kubectl sends them."""
    words = [tool("kubectl"), "kustomize", str(DEPLOY / "kubernetes" / folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def only(folder: str, kind: str) -> dict[str, Any]:
    (found,) = [one for one in built(folder) if one["kind"] == kind]
    return found


def pod(folder: str) -> dict[str, Any]:
    return dict(only(folder, "Deployment")["spec"]["template"])


def container(folder: str) -> dict[str, Any]:
    (found,) = pod(folder)["spec"]["containers"]
    return dict(found)


def of_image(target: str) -> dict[str, str]:
    """The variables that an image of the Dockerfile sets."""
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, str] = {}
    for stage in stages:
        if stage.startswith(
            ("runtime AS " + target, "python:${PYTHON_VERSION}-slim-bookworm AS runtime")
        ):
            found.update(
                re.findall(
                    r"(QWEN3VL_\w+)=(\S+)", "\n".join(re.findall(r"^ENV .*", stage, re.MULTILINE))
                )
            )
    assert "QWEN3VL_PORT" in found
    return found


def variables(folder: str) -> dict[str, str]:
    """The variables of a pod: of its image, then of its config map."""
    target = container(folder)["image"].removeprefix("qwen3vl:")
    return {**of_image(target), **only(folder, "ConfigMap")["data"]}


def settings(
    found: Mapping[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> Settings:
    """The settings of a server with these variables and arguments. Its files are in ``folder``."""
    for name in SECRETS:
        (folder / name).touch()
    known = {f"QWEN3VL_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in found if name.startswith("QWEN3VL_")} <= known
    for name, value in found.items():
        monkeypatch.setenv(name, re.sub(r"^/\S*/(?=tls\.|keys)|^%d/", f"{folder}/", value))
    command, *flags = words
    assert command == "serve"
    read = read_settings(command, flags)
    assert read is not None
    return read


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_manifests_fit_the_schemas_of_kubernetes(folder: str, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for one in built(folder):
        if one["kind"] not in FOREIGN:
            validate.validate(one, version, strict=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_settings_of_pods_are_valid(
    folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also that nobody gets in without TLS and a key."""
    found = settings(variables(folder), container(folder)["args"], monkeypatch, tmp_path)
    assert found.tls
    assert found.authenticated
    assert not found.insecure
    assert not found.loopback
    ports = {one["name"]: one["containerPort"] for one in container(folder)["ports"]}
    assert ports == {"grpc": found.port, "admin": found.admin_port}
    assert container(folder)["envFrom"] == [
        {"configMapRef": {"name": only(folder, "ConfigMap")["metadata"]["name"]}}
    ]
    wanted = (
        "lmdeploy" if "nvidia.com/gpu" in container(folder)["resources"]["limits"] else "reference"
    )
    assert found.engine == wanted


@pytest.mark.parametrize("folder", FOLDERS)
def test_secrets_are_where_the_settings_look_for_them(folder: str) -> None:
    mounts = {one["name"]: one["mountPath"] for one in container(folder)["volumeMounts"]}
    values = variables(folder)
    assert (
        Path(values["QWEN3VL_TLS_CERT"]) == Path(mounts["tls"]) / "tls.crt"
    )  # keys of a TLS secret
    assert Path(values["QWEN3VL_TLS_KEY"]) == Path(mounts["tls"]) / "tls.key"
    assert Path(values["QWEN3VL_API_KEYS_FILE"]) == Path(mounts["keys"]) / "keys"
    text = (ROOT / "docs/kubernetes.md").read_text()
    without_kind = re.sub(r"create secret (tls|generic)", "create secret", text)
    for volume in pod(folder)["spec"]["volumes"]:
        if "secret" in volume:
            assert f"create secret {volume['secret']['secretName']}" in without_kind


@pytest.mark.parametrize("folder", FOLDERS)
async def test_probes_ask_pages_that_exist(folder: str) -> None:
    probes = [container(folder)[name]["httpGet"] for name in ("livenessProbe", "readinessProbe")]
    assert {one["port"] for one in probes} == {"admin"}
    async with running(admin_port=0, load=False) as server:
        alive, ready = [await page(server.server.admin_port, one["path"]) for one in probes]
        assert (alive.status, ready.status) == (200, 503)  # it loads
        await server.server.load()
        assert [(await page(server.server.admin_port, one["path"])).status for one in probes] == [
            200,
            200,
        ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_have_no_rights_that_they_do_not_need(folder: str) -> None:
    spec, server = pod(folder)["spec"], container(folder)
    assert spec["securityContext"]["runAsNonRoot"]
    uid = re.search(r"useradd --uid (\d+)", (ROOT / "Dockerfile").read_text())
    assert uid is not None
    assert spec["securityContext"]["runAsUser"] == int(uid[1])
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False  # else the service sets QWEN3VL_PORT
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert server["resources"]["limits"]["memory"]
    assert {"cpu", "memory"} <= server["resources"]["requests"].keys()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_pod_has_the_time_to_drain(
    folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = settings(variables(folder), ["serve"], monkeypatch, tmp_path)
    sleeps = container(folder)["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = sleeps + found.drain_grace_s + CLOSE_LIMIT_S + EXIT_LIMIT_S
    assert pod(folder)["spec"]["terminationGracePeriodSeconds"] >= needed


def selectors(folder: str) -> Iterator[tuple[str, dict[str, str]]]:
    for one in built(folder):
        spec = one.get("spec", {})
        if one["kind"] == "Service":
            yield one["metadata"]["name"], spec["selector"]
        elif one["kind"] in ("Deployment", "PodDisruptionBudget"):
            yield one["kind"], spec["selector"]["matchLabels"]
        elif one["kind"] == "NetworkPolicy":
            yield one["kind"], spec["podSelector"]["matchLabels"]
    for spread in pod(folder)["spec"].get("topologySpreadConstraints", ()):
        yield "spread", spread["labelSelector"]["matchLabels"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_selector_selects_the_pods(folder: str) -> None:
    labels = pod(folder)["metadata"]["labels"]
    found = dict(selectors(folder))
    assert found.keys() >= {
        "qwen3vl",
        "qwen3vl-pods",
        "Deployment",
        "PodDisruptionBudget",
        "NetworkPolicy",
    }
    for name, selector in found.items():
        assert selector, name
        assert selector.items() <= labels.items(), name


@pytest.mark.parametrize("folder", FOLDERS)
def test_who_may_connect(folder: str) -> None:
    calls, admin = only(folder, "NetworkPolicy")["spec"]["ingress"]
    clients, *gateways = calls["from"]
    assert clients["podSelector"] == {"matchLabels": {"qwen3vl-client": "true"}}
    assert bool(gateways) == (folder == "overlays/gateway")
    assert [one["ports"] for one in (calls, admin)] == [[{"port": "grpc"}], [{"port": "admin"}]]
    assert all("namespaceSelector" in one for one in admin["from"])


def test_pods_are_scaled_by_a_metric_that_exists() -> None:
    scaler = only("overlays/several-gpus", "HorizontalPodAutoscaler")["spec"]
    deployment = only("overlays/several-gpus", "Deployment")
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (metric,) = scaler["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name.removeprefix("qwen3vl_") in METRICS
    assert int(metric["pods"]["target"]["averageValue"]) < Settings().max_queue
    rules = yaml.safe_load(
        (DEPLOY / "kubernetes/components/autoscaling/prometheus-adapter.yaml").read_text()
    )
    assert rules["rules"]["custom"][0]["seriesQuery"].startswith(name + "{")
    assert "replicas" not in deployment["spec"], "every apply would undo the autoscaler's work"


def test_the_route_leads_to_the_service() -> None:
    from service.pb.qwen3vl.v1 import vision_pb2 as pb

    route = only("overlays/gateway", "GRPCRoute")["spec"]
    (rule,) = route["rules"]
    offered = {name["method"]["service"] for name in rule["matches"]}
    assert offered == {
        pb.DESCRIPTOR.services_by_name["VisionService"].full_name,
        "grpc.health.v1.Health",
    }
    services = {
        one["metadata"]["name"]: [port["port"] for port in one["spec"]["ports"]]
        for one in built("overlays/gateway")
        if one["kind"] == "Service"
    }
    (behind,) = rule["backendRefs"]
    assert services[behind["name"]] == [behind["port"]]
    policy = only("overlays/gateway", "BackendTLSPolicy")["spec"]
    assert policy["targetRefs"][0]["name"] == behind["name"]


def test_the_compose_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server that only this machine can reach, Prometheus that finds it, Grafana with the dashboard."""
    folder = DEPLOY / "compose"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    server = services["server"]
    found = settings(
        {"QWEN3VL_HOST": "0.0.0.0", **server["environment"]},
        server["command"],
        monkeypatch,
        tmp_path,
    )
    published = [port for one in services.values() for port in one["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in published)
    inner = {int(port.rpartition(":")[2]) for port in server["ports"]}
    assert inner == {found.port, found.http_port}
    scraped = yaml.safe_load((folder / "prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["job_name"] == "qwen3vl"  # as the alerts and the dashboard say
    assert job["static_configs"] == [{"targets": [f"server:{found.admin_port}"]}]
    inside = {one["image"].partition(":")[0] for one in services.values()}
    assert inside == {"qwen3vl", "prom/prometheus", "grafana/grafana"}
    mounts = [one for service in services.values() for one in service.get("volumes", ())]
    files = [(one.split(":")[0], one.split(":")[1]) for one in mounts if one.startswith(".")]
    assert all((folder / source).resolve().is_file() for source, _ in files)
    (provider,) = yaml.safe_load((folder / "grafana/dashboards.yaml").read_text())["providers"]
    boards = [Path(target) for source, target in files if source.endswith("dashboard.json")]
    assert [str(one.parent) for one in boards] == [provider["options"]["path"]]
    (source,) = yaml.safe_load((folder / "grafana/datasources.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert (
        int(server["stop_grace_period"].rstrip("s"))
        >= found.drain_grace_s + CLOSE_LIMIT_S + EXIT_LIMIT_S
    )


# systemd


def unit(name: str = "qwen3vl.service") -> dict[str, list[str]]:
    """Key -> its values, in order."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / name).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def environment_of(found: Mapping[str, list[str]]) -> dict[str, str]:
    return dict(
        pair.split("=", 1) for line in found.get("Environment", ()) for pair in line.split()
    )


@pytest.mark.parametrize("drop_in", [None, "gpu.conf"])
def test_the_settings_of_the_unit_are_valid(
    drop_in: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = (DEPLOY / "systemd/qwen3vl.env").read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    found |= environment_of(unit())
    found |= environment_of(unit(drop_in)) if drop_in else {}
    found.pop("HOME")
    (start,) = unit()["ExecStart"]
    program, *words = start.split()
    assert Path(program).name == "qwen3vl"
    read = settings(found, words, monkeypatch, tmp_path)
    assert read.tls
    assert read.authenticated
    assert read.engine == ("lmdeploy" if drop_in else "reference")
    (stop,) = unit()["TimeoutStopSec"]
    assert int(stop) >= read.drain_grace_s + CLOSE_LIMIT_S + EXIT_LIMIT_S
    credentials = {one.partition(":")[0] for one in unit()["LoadCredential"]}
    assert credentials == SECRETS


def runnable(folder: Path, drop_in: str | None = None) -> Path:
    """The unit, with programs and files that this machine has, because systemd-analyze looks for them."""
    text = (DEPLOY / "systemd/qwen3vl.service").read_text()
    copy = folder / "qwen3vl.service"
    copy.write_text(text.replace("/opt/qwen3vl/bin/qwen3vl", sys.executable))
    if drop_in is not None:
        (folder / "qwen3vl.service.d").mkdir()
        shutil.copy(DEPLOY / "systemd" / drop_in, folder / "qwen3vl.service.d")
    return copy


@pytest.mark.parametrize("drop_in", [None, "gpu.conf"])
def test_systemd_accepts_the_unit(drop_in: str | None, tmp_path: Path) -> None:
    words = [tool("systemd-analyze"), "verify", "--man=no", str(runnable(tmp_path, drop_in))]
    done = subprocess.run(words, capture_output=True, text=True)
    ours = [
        line for line in done.stderr.splitlines() if "qwen3vl" in line
    ]  # others: of this machine
    assert (done.returncode, ours) == (0, [])


def test_systemd_finds_little_that_is_exposed(tmp_path: Path) -> None:
    """From 0, nothing, to 10; a unit without hardening has 9.6."""
    words = [tool("systemd-analyze"), "security", "--offline=true", "--threshold=20"]
    done = subprocess.run([*words, str(runnable(tmp_path))], capture_output=True, text=True)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot read a unit without a running systemd")
    assert done.returncode == 0, done.stdout[-500:]
