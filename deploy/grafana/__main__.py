"""Generates the dashboards from boards/: ``python -m deploy.grafana``."""

from __future__ import annotations

import json
from pathlib import Path

from deploy.grafana.boards.budget import BUDGET
from deploy.grafana.boards.learning import LEARNING
from deploy.grafana.boards.run import RUN
from deploy.grafana.boards.samplers import SAMPLERS
from deploy.grafana.boards.services import SERVICES
from deploy.grafana.model import dashboard_json

BOARDS = (RUN, BUDGET, LEARNING, SAMPLERS, SERVICES)
FOLDER = Path(__file__).with_name("dashboards")


def render_dashboards() -> dict[Path, str]:
    """The text of each file."""
    return {
        FOLDER / f"{board.uid}.json": json.dumps(dashboard_json(board, BOARDS), indent=1, ensure_ascii=False) + "\n"
        for board in BOARDS
    }


if __name__ == "__main__":
    for path, text in render_dashboards().items():
        path.write_text(text, encoding="utf-8")
        print(path)
