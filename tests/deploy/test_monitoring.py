"""Alerts, dashboard and runbook: every metric, label and name in them exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.engines.fake import FakeEngine
from service.error_table import REASONS
from service.lifecycle import Phase
from tests.service.admin_pages import page
from tests.service.test_metrics import HISTOGRAM_SUFFIXES, METRICS, scripted_mix, with_keys

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()
TARGET_LABELS = {"job", "instance"}
"""Labels that Prometheus adds to every series of a target."""
OF_PROMETHEUS = {"up": set[str]()}
GRAFANA = {"$__rate_interval": "5m", "$instance": ".*"}
FOR_COUNTERS = {"rate", "increase"}
CUMULATIVE = ("_total", *HISTOGRAM_SUFFIXES)
VALUES = {
    "reason": {*REASONS, "grown"},
    "code": {one.name for one in grpc.StatusCode},
    "qwen3vl_phase": {one.value for one in Phase},
    "job": {"qwen3vl"},
}
"""Label -> values that a matcher may name."""


@dataclass(frozen=True)
class Use:
    """A series that a query selects, with the functions around it."""

    name: str
    matchers: tuple[tuple[str, str], ...]
    inside: tuple[str, ...]


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "dashboard.json").read_text()))


def queries() -> dict[str, str]:
    """Where a query stands -> the query, with the variables of Grafana filled in."""
    found = {rule["alert"]: rule["expr"] for rule in alerts()}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"]
            for variable, value in GRAFANA.items():
                text = text.replace(variable, value)
            found[f"{panel['title']}, {target['refId']}"] = text
    return found


QUERIES = queries()


def uses(node: Any, inside: tuple[str, ...] = ()) -> Iterator[Use]:
    """Every series that a parsed query selects."""
    if isinstance(node, promql_parser.VectorSelector):
        matchers = node.matchers.matchers
        yield Use(node.name, tuple((one.name, one.value) for one in matchers), inside)
        return
    if isinstance(node, promql_parser.BinaryExpr) and str(node.op) == "unless":
        inside = (*inside, "unless")
    if isinstance(node, promql_parser.Call):
        inside = (*inside, node.func.name)
    for child in ("lhs", "rhs", "expr", "vector_selector"):
        if hasattr(node, child):
            yield from uses(getattr(node, child), inside)
    for argument in getattr(node, "args", ()):
        yield from uses(argument, inside)


def groupings(node: Any) -> Iterator[tuple[set[str], set[str]]]:
    """Labels that results are grouped by, and the names of the series below."""
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        yield set(node.modifier.labels), {use.name for use in uses(node)}
    for child in ("lhs", "rhs", "expr"):
        if hasattr(node, child):
            yield from groupings(getattr(node, child))
    for argument in getattr(node, "args", ()):
        yield from groupings(argument)


def own_labels(name: str) -> set[str]:
    """Labels of a series of the server, without those that Prometheus adds."""
    short = name.removeprefix("qwen3vl_")
    for suffix in HISTOGRAM_SUFFIXES:
        if short.removesuffix(suffix) in METRICS and short not in METRICS:
            extra = {"le"} if suffix == "_bucket" else set()
            return METRICS[short.removesuffix(suffix)] | extra
    return METRICS[short]


@pytest.mark.parametrize("where", QUERIES)
def test_labels_and_functions_fit_the_metric(where: str) -> None:
    parsed = promql_parser.parse(QUERIES[where])
    found = list(uses(parsed))
    assert found, "a query selects something"
    for use in found:
        ours = use.name.startswith("qwen3vl_")
        labels = (own_labels(use.name) if ours else set()) | TARGET_LABELS
        assert {label for label, _ in use.matchers} <= labels, use
        for label, value in use.matchers:
            if label != "instance":
                assert set(value.split("|")) <= VALUES[label], use
        if FOR_COUNTERS & set(use.inside):
            assert use.name.endswith(CUMULATIVE), use
        elif ours and "unless" not in use.inside:  # there, whether a series exists is the question
            assert not use.name.endswith(CUMULATIVE), use
        if "histogram_quantile" in use.inside:
            assert use.name.endswith("_bucket"), use
    for labels, names in groupings(parsed):
        for name in names:
            assert labels <= own_labels(name) | TARGET_LABELS, (labels, name)


async def test_every_metric_in_a_query_is_on_the_page(tmp_path: Path) -> None:
    engine = FakeEngine("[1, 1]")
    async with with_keys(tmp_path, engine, max_concurrent=1, max_queue=0) as started:
        await scripted_mix(started)
        text = (await page(started.server.admin_port, "/metrics")).text
    families = list(text_string_to_metric_families(text))
    on_page = {sample.name for family in families for sample in family.samples}
    # A counter with labels has no series before its first count, but stands on the page.
    without_series = {family.name for family in families if not family.samples}
    for where, query in QUERIES.items():
        for use in uses(promql_parser.parse(query)):
            bare = re.sub(r"_(total|bucket|count|sum)$", "", use.name)
            known = use.name in on_page or bare in without_series or use.name in OF_PROMETHEUS
            assert known, (where, use.name)


def test_the_dashboard_shows_every_metric() -> None:
    shown = {use.name for query in QUERIES.values() for use in uses(promql_parser.parse(query))}
    ours = {
        re.sub(r"_(bucket|count|sum)$", "", name.removeprefix("qwen3vl_"))
        for name in shown
        if name.startswith("qwen3vl_")
    }
    assert ours == METRICS.keys()


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not covered & cells, panel["title"]
        cells |= covered


# The runbook


def headings() -> set[str]:
    return set(re.findall(r"^### (\S+)$", RUNBOOK, re.MULTILINE))


def reasons_of_the_server() -> set[str]:
    """Reasons of errors that no change of the request avoids."""
    return {row.name for row in REASONS.values() if row.http >= 500 or row.http == 429}


def test_every_alert_and_every_reason_of_the_server_has_an_entry() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    entries = {name for name in headings() if name in {*names, *REASONS} or name[:4] == "Qwen"}
    assert entries == {*names, *reasons_of_the_server()}


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_it_is_and_where_to_read(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"]["summary"]
    url = rule["annotations"]["runbook_url"]
    assert url == f"docs/operations.md#{rule['alert'].lower()}"


def test_the_scrape_configuration_loads_the_alerts_under_the_name_of_their_job() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert all((FOLDER / name).is_file() for name in config["rule_files"])
    assert [one["job_name"] for one in config["scrape_configs"]] == ["qwen3vl"]
