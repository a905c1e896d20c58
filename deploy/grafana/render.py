"""Plots the panels from a Prometheus server, with their own queries: ``python -m deploy.grafana.render URL FOLDER [MINUTES]``.

For documentation, and where there is no Grafana; one PNG a dashboard.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deploy.grafana.__main__ import BOARDS
from deploy.grafana.model import Dashboard, Panel
from deploy.grafana.queries import fill_variables

POINTS = 120
COLUMNS = 3
PERCENT = {"percentunit": 100.0}
UNITS = {"percentunit": "%", "s": "s", "bytes": "bytes", "Bps": "bytes/s"}
Series = list[dict[str, Any]]


def query_range(url: str, query: str, minutes: float) -> Series:
    """The series of a query over the last ``minutes``."""
    now = time.time()
    span = {"query": query, "start": now - 60 * minutes, "end": now, "step": max(1.0, 60 * minutes / POINTS)}
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{urllib.parse.urlencode(span)}", timeout=30) as answer:  # noqa: S310
        return json.load(answer)["data"]["result"]


def legend(template: str, labels: dict[str, str]) -> str:
    """A legend with its {{label}}s filled in, as Grafana does."""
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), template).strip()


def plot_panel(axes: Axes, panel: Panel, url: str, minutes: float) -> None:
    """One panel; a number with its course where Grafana has a number."""
    last, began = math.nan, time.time() - 60 * minutes
    for template, query in panel.queries.items():
        for series in query_range(url, fill_variables(query), minutes):
            points = [(float(at), PERCENT.get(panel.unit, 1.0) * float(value)) for at, value in series["values"]]
            name = legend(template, series["metric"]) or "none"
            axes.plot([(at - began) / 60 for at, _ in points], [value for _, value in points], lw=1.2, label=name)
            last = points[-1][1]
    unit = UNITS.get(panel.unit, "")
    axes.set_title(
        f"{panel.title}: {last:.4g} {unit}" if panel.kind == "stat" else f"{panel.title} {unit and f'({unit})'}", fontsize=9
    )
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if panel.kind != "stat" and axes.lines:
        axes.legend(fontsize=6, loc="best")


def render_dashboard(board: Dashboard, url: str, folder: Path, minutes: float) -> Path:
    """Draw ``board``; returns the file."""
    rows = math.ceil(len(board.panels) / COLUMNS)
    figure = Figure(figsize=(13, 2.3 * rows), layout="constrained")
    cells: list[Axes] = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, panel in zip(cells, board.panels, strict=False):
        plot_panel(axes, panel, url, minutes)
    for axes in cells[len(board.panels) :]:
        axes.set_axis_off()
    figure.suptitle(f"{board.title}: {board.about}", fontsize=10)
    figure.supxlabel("minutes", fontsize=8)
    path = folder / f"dashboard-{board.uid}.png"
    figure.savefig(path, dpi=80)
    return path


if __name__ == "__main__":
    mpl.use("agg")
    address, target = sys.argv[1], Path(sys.argv[2])
    for one in BOARDS:
        print(render_dashboard(one, address, target, float(sys.argv[3]) if len(sys.argv) > 3 else 60.0))
