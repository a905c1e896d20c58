"""All Prometheus queries: of the panels, with the variables filled in, of annotations and of alerts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml

from deploy.grafana.__main__ import BOARDS
from deploy.grafana.model import ANNOTATIONS, promql

ALERTS = Path(__file__).parents[1] / "prometheus" / "alerts.yml"


def fill_variables(query: str, run: str = ".*", sampler: str = ".*") -> str:
    """A panel's query as Grafana sends it."""
    return promql(query).replace("$run", run).replace("$sampler", sampler).replace("$__interval", "30s")


def panel_queries() -> dict[str, str]:
    """By board, panel and legend."""
    return {
        f"{board.title} / {panel.title} / {legend}": fill_variables(query)
        for board in BOARDS
        for panel in board.panels
        for legend, query in panel.queries.items()
    }


def annotation_queries() -> dict[str, str]:
    """By name; every board has them all."""
    return {name: fill_variables(query) for name, _, query, *_ in ANNOTATIONS}


def alert_rules() -> dict[str, dict[str, Any]]:
    """By name."""
    groups = cast("list[dict[str, Any]]", yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"])
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}
