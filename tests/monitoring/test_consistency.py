"""Rules, dashboards, runbook and code speak of the same things. What runs them is test_rules.py."""

import json
import re
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

import services.api.metrics
import services.gateway.metrics
import shared.loop
from services.api.settings import ApiSettings
from services.gateway.app import BOARD_AGE_MAX_S
from services.gateway.settings import GatewaySettings
from tests.monitoring.queries import (
    CONFIGURATION,
    DASHBOARDS,
    ROOT,
    Query,
    alerts,
    dashboard_queries,
    rule_queries,
    rules,
)

RUNBOOK = (ROOT / "deploy/runbook.md").read_text()

OTHERS = {
    # Prometheus itself.
    "up", "ALERTS",
    # node_exporter, kubelet, blackbox_exporter, cert-manager.
    "node_filesystem_avail_bytes", "node_filesystem_size_bytes",
    "kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes",
    "probe_ssl_earliest_cert_expiry", "probe_success",
    "certmanager_certificate_expiration_timestamp_seconds",
}  # fmt: skip
"""Metrics of other programs than ours."""

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}

SCREEN_ROWS = 25
"""Of 38 pixels each: what a browser of 1080 lines shows of a dashboard without scrolling."""


def exported() -> set[str]:
    """What a replica's /metrics can have, labels or not."""
    names = {sample.name for family in REGISTRY.collect() for sample in family.samples}
    for module in (services.api.metrics, services.gateway.metrics, shared.loop):
        for metric in vars(module).values():
            if isinstance(metric, MetricWrapperBase):
                (family,) = metric.collect()
                names |= {family.name + suffix for suffix in SUFFIXES[family.type]}
    return names


def test_every_metric_that_is_asked_for_is_exported() -> None:
    """By a replica, by a recording rule, or by a program that is named here."""
    known = exported() | OTHERS | {rule["record"] for rule in rules() if "record" in rule}
    unknown = {
        query.place: missing
        for query in (*rule_queries(), *dashboard_queries())
        if (missing := query.metrics - known)
    }
    assert unknown == {}


def test_a_metric_that_nobody_exports_is_found() -> None:
    """The check itself: names are told from functions, labels, texts and words."""
    query = Query("here", 'sum by (a) (rate(b_total{c="d"}[5m])) > on (e) group_left (f) g:h or i')
    assert query.metrics == {"b_total", "g:h", "i"}


@pytest.mark.parametrize("name", alerts())
def test_every_alert_has_a_section_in_the_runbook(name: str) -> None:
    """It says what it means, what users notice, how to look and what to do."""
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))
    for part in ("**Means.**", "**Users notice.**", "**Look.**", "**Do.**"):
        assert part in sections.get(name, ""), f"{name} has no {part}"
    alert = alerts()[name]
    assert alert["annotations"]["runbook"] == f"deploy/runbook.md#{name.lower()}"
    assert alert["annotations"]["summary"]
    assert alert["labels"]["severity"] in ("page", "ticket")


def test_the_runbook_has_no_other_alert() -> None:
    """Nobody looks for one that cannot fire."""
    assert set(re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE)) == set(alerts())


def cases() -> list[dict[str, Any]]:
    """What `promtool test rules` is given."""
    return [
        case
        for path in (ROOT / "tests/monitoring").glob("alerts*.yml")
        for case in yaml.safe_load(path.read_text())["tests"]
    ]


@pytest.mark.parametrize("name", alerts())
def test_every_alert_has_a_case_in_which_it_fires(name: str) -> None:
    """Of `promtool test rules`."""
    about = [
        asked
        for case in cases()
        for asked in case["promql_expr_test"]
        if f'alertname="{name}"' in asked["expr"]
    ]
    assert any(asked["exp_samples"] for asked in about)


def test_every_alert_has_a_case_in_which_it_stays_quiet() -> None:
    """One in which nothing at all is even pending, and every metric that an alert reads is there."""
    (quiet,) = (
        case
        for case in cases()
        if {"expr": "ALERTS", "exp_samples": []}.items() <= case["promql_expr_test"][0].items()
        and "all is well" in case["name"]
    )
    there = {re.split(r"\W", series["series"])[0] for series in quiet["input_series"]}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert {query.place: query.metrics - there - recorded for query in rule_queries()} == {
        query.place: set() for query in rule_queries()
    }


def test_numbers_of_the_rules_are_those_of_the_code() -> None:
    """A board is stale when the gateway stops being ready; latency is cut at a bucket there is."""
    expressions = [rule["expr"] for rule in rules()]
    assert f"scoreboard_gateway_board_age_seconds > bool {BOARD_AGE_MAX_S:g}" in expressions
    (metric,) = services.api.metrics.REQUEST_SECONDS.labels("/").collect()
    buckets = {sample.labels["le"] for sample in metric.samples if "le" in sample.labels}
    assert set(re.findall(r'le="([^"]+)"', "".join(expressions))) <= buckets


def test_prometheus_asks_where_the_replicas_listen() -> None:
    """By the defaults of their settings, and finds them often enough to see one within 15 s."""
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    interval = int(configuration["global"]["scrape_interval"].removesuffix("s"))
    found = {
        job["job_name"]: job["dns_sd_configs"][0]
        for job in configuration["scrape_configs"]
        if "dns_sd_configs" in job
    }
    ports = {
        "api": ApiSettings.model_fields["port"].default,
        "gateway": GatewaySettings.model_fields["operations_port"].default,
    }
    for name, port in ports.items():
        assert (found[name]["names"], found[name]["port"]) == ([name], port)
        assert int(found[name]["refresh_interval"].removesuffix("s")) + interval < 15


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_fits_a_screen(path: object) -> None:
    """Fixed uid and data source, no panel over another, all of it to be seen at 1080p."""
    dashboard = json.loads(path.read_text())  # type: ignore[attr-defined]
    assert dashboard["uid"] == f"scoreboard-{path.stem}"  # type: ignore[attr-defined]
    assert "id" not in dashboard
    provisioned = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    )
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == provisioned["datasources"][0]["uid"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another"
        taken |= cells
        assert place["x"] + place["w"] <= 24
        assert place["w"] >= 3, "too narrow to read"
        assert place["y"] + place["h"] <= SCREEN_ROWS
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
