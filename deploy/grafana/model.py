"""The model of a dashboard, and its JSON for Grafana.

A query is PromQL with two abbreviations, so that a panel stays one readable line:

    {@}     {run=~"$run"}                      {@, kind="train"}    the same and more
    {@s}    {run=~"$run", instance=~"$sampler"}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SOURCE = {"type": "prometheus", "uid": "prometheus"}
SCHEMA_VERSION = 41
WIDTH = 24
HEIGHT = {"stat": 4, "timeseries": 8}


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str
    """Grafana's name of the unit: percentunit, s, bytes, short …"""
    queries: Mapping[str, str]
    """PromQL by legend; {{label}} in a legend is the series' label."""
    about: str
    """What it shows, and how it looks when all is well."""
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class PanelRow:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    about: str
    rows: Sequence[PanelRow]
    by_sampler: bool = False
    """Whether one can choose samplers."""

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]


def stat_panel(title: str, unit: str, query: str, about: str) -> Panel:
    """One number, with its history behind it."""
    return Panel(title, unit, {title.lower(): query}, about, kind="stat", width=4)


def promql(query: str) -> str:
    """A query with its abbreviations written out."""
    return query.replace("{@s", '{run=~"$run", instance=~"$sampler"').replace("{@", '{run=~"$run"')


def dashboard_json(board: Dashboard, others: Sequence[Dashboard]) -> dict[str, Any]:
    """The dashboard as Grafana's JSON, with links to ``others``."""
    return {
        "uid": f"treegrpo-{board.uid}",
        "title": f"treegrpo · {board.title}",
        "description": board.about,
        "tags": ["treegrpo"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [_link(other) for other in others if other is not board],
        "templating": {"list": [_variable("run", "treegrpo_serving"), *([SAMPLERS] if board.by_sampler else [])]},
        "annotations": {"list": [_annotation(*row) for row in ANNOTATIONS]},
        "panels": _laid_out(board),
    }


def _link(board: Dashboard) -> dict[str, Any]:
    return {
        "title": board.title,
        "tooltip": board.about,
        "type": "link",
        "icon": "dashboard",
        "url": f"/d/treegrpo-{board.uid}",
        "tags": [],
        "asDropdown": False,
        "targetBlank": False,
        "includeVars": True,
        "keepTime": True,
    }


def _variable(name: str, metric: str, label: str = "") -> dict[str, Any]:
    query = f"label_values({metric}, {label or name})"
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


SAMPLERS = _variable("sampler", 'treegrpo_engine_running{run=~"$run"}', "instance")
ANNOTATIONS = (
    ("starts", "red", "treegrpo_start_time_seconds{@} * 1000", "{{job}} {{instance}} started", True),
    (
        "every 20th policy version",
        "blue",
        "floor(treegrpo_policy_version_step{@} / 20) > floor(treegrpo_policy_version_step{@} offset $__interval / 20)",
        "policy versions of {{run}}",
        False,
    ),
)


def _annotation(name: str, colour: str, query: str, title: str, at_value: bool) -> dict[str, Any]:
    """``at_value``: the query's value is the time, in milliseconds. Without it Grafana shows where the value is above 0."""
    expr, step = promql(query), "30s"
    return {
        "name": name,
        "enable": True,
        "iconColor": colour,
        "datasource": SOURCE,
        "target": {"refId": "Anno", "expr": expr, "interval": step},
        "expr": expr,  # where Grafana up to 12.0 looks
        "step": step,
        "titleFormat": title,
        "useValueForTime": at_value,
    }


def _laid_out(board: Dashboard) -> list[dict[str, Any]]:
    """Rows one below the other, their panels from left to right."""
    made: list[dict[str, Any]] = []
    y = 0
    for row in board.rows:
        made.append(_header(row, len(made) + 1, y))
        x, y, height = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            height = max(height, HEIGHT[panel.kind])
            made.append(_panel(panel, len(made) + 1, {"x": x, "y": y, "w": panel.width, "h": HEIGHT[panel.kind]}))
            x += panel.width
        y += height
    return made


def _header(row: PanelRow, number: int, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "row",
        "title": row.title,
        "collapsed": False,
        "panels": [],
        "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
    }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom = {"fillOpacity": 25, "stacking": {"mode": "normal"}} if panel.stacked else {"fillOpacity": 5}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, **({} if panel.kind == "stat" else {"custom": custom})},
            "overrides": [],
        },
        "options": _options(panel.kind),
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": SOURCE,
                "expr": promql(query),
                "legendFormat": legend,
                "range": True,
            }
            for place, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _options(kind: str) -> dict[str, Any]:
    if kind == "stat":
        return {
            "graphMode": "area",
            "colorMode": "value",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        }
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
