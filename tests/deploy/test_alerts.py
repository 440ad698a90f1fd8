"""The alerts fire: promtool, which comes with Prometheus, plays series to the rules.

Skipped where promtool is missing; Debian and Ubuntu have it in the package ``prometheus``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.test_monitoring import FOLDER, alerts

PROMTOOL = os.environ.get("PROMTOOL") or shutil.which("promtool")
pytestmark = pytest.mark.slow
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is missing; it comes with Prometheus"
)
HERE = 'job="qwen3vl",instance="one:9090"'
THERE = 'job="qwen3vl",instance="two:9090"'
LENGTH = 90
"""Minutes of every series."""


def constant(value: float) -> str:
    return f"{float(value)}x{LENGTH}"


def rising(per_minute: float, begin: float = 0) -> str:
    return f"{begin:g}+{per_minute:g}x{LENGTH}"


def calls(code: str, reason: str) -> str:
    return f'qwen3vl_calls_total{{{HERE},transport="grpc",method="RunTask",code="{code}",reason="{reason}"}}'


def first_token(bound: str) -> str:
    return f'qwen3vl_time_to_first_token_seconds_bucket{{{HERE},le="{bound}"}}'


def of(name: str, labels: str = "", target: str = HERE) -> str:
    return f"{name}{{{target}{',' if labels else ''}{labels}}}"


DEFECTS = calls("INTERNAL", "INTERNAL")
HEALTHY = {
    of("up"): constant(1),
    **{
        of("qwen3vl_phase", f'qwen3vl_phase="{phase}"'): constant(phase == "serving")
        for phase in ("loading", "serving", "unhealthy", "draining")
    },
    of("process_start_time_seconds"): constant(1_700_000_000),
    calls("OK", "-"): rising(600),
    calls("UNAVAILABLE", "ENGINE_LOADING"): rising(6),
    calls("RESOURCE_EXHAUSTED", "OVERLOADED"): rising(6),
    calls("DEADLINE_EXCEEDED", "INFERENCE_TIMEOUT"): rising(6),
    calls("INTERNAL", "OUTPUT_INVALID"): rising(6),
    of("qwen3vl_requests_queued"): constant(100),
    of("qwen3vl_requests_queued_limit"): constant(256),
    first_token("0.5"): rising(590),
    first_token("10.0"): rising(600),
    first_token("30.0"): rising(600),
    first_token("+Inf"): rising(600),
    of("qwen3vl_authentication_failures_total", 'reason="API_KEY_INVALID"'): rising(30),
    of("qwen3vl_kv_cache_utilization_ratio", 'model="m"'): constant(0.9),
    of("qwen3vl_image_memory_bytes", 'budget="decoding"'): constant(5e8),
    of("qwen3vl_image_memory_limit_bytes", 'budget="decoding"'): constant(1e9),
    of("qwen3vl_grammar_worker_restarts_total", 'reason="grown"'): rising(5),
    of("qwen3vl_grammar_worker_restarts_total", 'reason="timeout"'): rising(0.1),
    of("qwen3vl_log_lines_dropped_total"): constant(7),
    of("process_open_fds"): constant(100),
    of("process_max_fds"): constant(1024),
}
"""Series of a server that is busy and well; its alerts are silent. Series -> values, one a minute."""

TROUBLE: dict[str, tuple[int, dict[str, str]]] = {
    "Qwen3vlDown": (3, {of("up"): constant(0)}),
    "Qwen3vlUnhealthy": (2, {of("qwen3vl_phase", 'qwen3vl_phase="unhealthy"'): constant(1)}),
    "Qwen3vlLoadingForLong": (21, {of("qwen3vl_phase", 'qwen3vl_phase="loading"'): constant(1)}),
    "Qwen3vlRestarts": (40, {of("process_start_time_seconds"): "1x10 2x10 3x10 4x60"}),
    "Qwen3vlDefects": (30, {DEFECTS: "3x20 4x70"}),
    "Qwen3vlUnavailable": (11, {calls("UNAVAILABLE", "ENGINE_LOADING"): rising(60)}),
    "Qwen3vlOverloaded": (16, {calls("RESOURCE_EXHAUSTED", "OVERLOADED"): rising(60)}),
    "Qwen3vlQueueLong": (11, {of("qwen3vl_requests_queued"): constant(250)}),
    "Qwen3vlTimeouts": (16, {calls("DEADLINE_EXCEEDED", "INFERENCE_TIMEOUT"): rising(60)}),
    "Qwen3vlSlowFirstToken": (
        21,
        {first_token("10.0"): rising(560), first_token("0.5"): rising(500)},
    ),
    "Qwen3vlInvalidAnswers": (31, {calls("INTERNAL", "OUTPUT_INVALID"): rising(60)}),
    "Qwen3vlAuthenticationFailures": (
        16,
        {of("qwen3vl_authentication_failures_total", 'reason="API_KEY_INVALID"'): rising(120)},
    ),
    "Qwen3vlKvCacheFull": (
        16,
        {of("qwen3vl_kv_cache_utilization_ratio", 'model="m"'): constant(0.97)},
    ),
    "Qwen3vlImageMemoryFull": (
        11,
        {of("qwen3vl_image_memory_bytes", 'budget="decoding"'): constant(9.9e8)},
    ),
    "Qwen3vlGrammarWorkersEnd": (
        20,
        {of("qwen3vl_grammar_worker_restarts_total", 'reason="timeout"'): rising(1)},
    ),
    "Qwen3vlLogLinesDropped": (6, {of("qwen3vl_log_lines_dropped_total"): "7x5 9x85"}),
    "Qwen3vlDescriptorsLow": (6, {of("process_open_fds"): constant(900)}),
}
"""Alert -> the minute by which it fires, and the series that differ from HEALTHY."""


def played(series: dict[str, str], minute: int, firing: set[str]) -> dict[str, Any]:
    """A test of promtool: which of the alerts fire at a minute."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname, instance) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minute}m",
                "exp_samples": [
                    {"labels": f'{{alertname="{name}",instance="one:9090"}}', "value": 1}
                    for name in sorted(firing)
                ],
            }
        ],
    }


def run(folder: Path, tests: list[dict[str, Any]]) -> str:
    """What promtool says; empty where all tests pass."""
    assert PROMTOOL is not None
    file = folder / "tests.yml"
    rules = [str(FOLDER / "alerts.yml")]
    file.write_text(yaml.safe_dump({"rule_files": rules, "tests": tests}))
    done = subprocess.run([PROMTOOL, "test", "rules", str(file)], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_every_alert_is_provoked() -> None:
    assert TROUBLE.keys() == {rule["alert"] for rule in alerts()}


@needs_promtool
def test_promtool_accepts_the_rules_and_the_scrape_configuration() -> None:
    assert PROMTOOL is not None
    for command in (("rules", "alerts.yml"), ("config", "prometheus.yml")):
        done = subprocess.run(
            [PROMTOOL, "check", *command], cwd=FOLDER, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_alerts_are_silent_on_a_healthy_server(tmp_path: Path) -> None:
    assert run(tmp_path, [played(HEALTHY, minute, set()) for minute in (1, 20, 45, 90)]) == ""


@needs_promtool
@pytest.mark.parametrize("alert", TROUBLE)
def test_an_alert_fires(tmp_path: Path, alert: str) -> None:
    """And no other one, and not for another server, which is well."""
    minute, series = TROUBLE[alert]
    assert series.keys() <= {*HEALTHY, DEFECTS}
    well = {name.replace(HERE, THERE): values for name, values in HEALTHY.items()}
    everything = {**HEALTHY, **series, **well}
    assert run(tmp_path, [played(everything, minute, {alert})]) == ""


@needs_promtool
def test_the_first_defect_of_a_server_is_noticed(tmp_path: Path) -> None:
    """The series begins with the count 1, which increase() does not see."""
    series = {**HEALTHY, DEFECTS: "_x5 1x85"}
    fires, is_over = played(series, 7, {"Qwen3vlDefects"}), played(series, 30, set())
    assert run(tmp_path, [fires, is_over]) == ""
