"""Every PromQL query that operators are given, and where it stands."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "deploy/prometheus/prometheus.yml"
RULES = sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))

_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(r"\{[^}]*\}")
_RANGE = re.compile(r"\[[^\]]*\]")
_LABELS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_NAME = re.compile(r"(?<![\w:$])[a-zA-Z_:][\w:]*(?!\s*\()(?![\w:])")
_LABEL_VALUES = re.compile(r"^label_values\((.+), \w+\)$")
"""What Grafana offers as values of a variable: the label of these series."""

_WORDS = {"and", "or", "unless", "bool", "offset"}


@dataclass(frozen=True)
class Query:
    """A query and its place: file and title."""

    place: str
    expression: str

    @property
    def metrics(self) -> set[str]:
        """The metrics it names."""
        rest = self.expression
        for pattern in (_TEXT, _SELECTOR, _RANGE, _LABELS):
            rest = pattern.sub(" ", rest)
        return set(_NAME.findall(rest)) - _WORDS


def rules() -> list[dict[str, Any]]:
    """Recording rules (`record`) and alerts (`alert`), in order."""
    return [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]


def alerts() -> dict[str, dict[str, Any]]:
    """Alerts by name."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def dashboard_queries() -> Iterator[Query]:
    """Those of every panel and variable."""
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield Query(f"{path.name}: {panel['title']}", target["expr"])
        for variable in dashboard["templating"]["list"]:
            (series,) = _LABEL_VALUES.findall(variable["query"]["query"])
            yield Query(f"{path.name}: ${variable['name']}", series)


def rule_queries() -> Iterator[Query]:
    """Those of every rule."""
    for rule in rules():
        yield Query(rule.get("alert") or rule["record"], rule["expr"])
