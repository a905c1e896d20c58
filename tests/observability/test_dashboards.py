"""Dashboards and alerts as files: current, complete, of metrics that exist, and as Grafana and Prometheus want them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.__main__ import BOARDS, FOLDER, render_dashboards
from deploy.grafana.queries import alert_rules, annotation_queries, panel_queries
from treegrpo.observability.metrics import MISMATCH_LIMIT, IntakeMetrics, RetrieverMetrics, SamplerMetrics, TrainerMetrics

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus"
NAME = re.compile(r"\btreegrpo_\w+")
PART = re.compile(r"_(bucket|sum|count)$")
NOT_SHOWN = {
    "treegrpo_rollout_tokens_total": "the ledger has what was computed, and the depth panel what was cached",
    "treegrpo_rollout_unique_tokens_total": "what the trainer's packs hold; trained_token_ratio says what that saves",
}
"""Metrics that no board and no alert asks for, with the reason."""


def every_query() -> dict[str, str]:
    """What anybody of ours asks Prometheus."""
    alerts = {name: rule["expr"] for name, rule in alert_rules().items()}
    return {**panel_queries(), **annotation_queries(), **alerts, **recorded()}


def known_names() -> set[str]:
    """Every series that a service of ours can serve."""
    registries = [kind().registry for kind in (IntakeMetrics, TrainerMetrics, SamplerMetrics, RetrieverMetrics)]
    families = [family for registry in registries for family in registry.collect()]
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


def recorded() -> dict[str, str]:
    """Recording rules by name."""
    groups = yaml.safe_load((RULES / "rules.yml").read_text(encoding="utf-8"))["groups"]
    return {rule["record"]: rule["expr"] for group in groups for rule in group["rules"]}


def test_the_dashboards_are_as_their_description_says() -> None:
    expected = render_dashboards()
    assert {path.name for path in FOLDER.iterdir()} == {path.name for path in expected}
    stale = [path.name for path, text in expected.items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "python -m deploy.grafana writes them again"


def test_every_query_is_of_metrics_that_exist() -> None:
    known = known_names()
    unknown = {where: set(NAME.findall(query)) - known for where, query in every_query().items()}
    assert {where: names for where, names in unknown.items() if names} == {}


def test_every_metric_is_shown_or_has_a_reason_not_to_be() -> None:
    asked = {PART.sub("", name) for query in every_query().values() for name in NAME.findall(query)}
    assert {PART.sub("", name) for name in known_names()} - asked == set(NOT_SHOWN)


def test_no_other_file_of_deploy_names_a_metric_that_is_none() -> None:
    files = [path for path in (ROOT / "deploy").rglob("*") if path.suffix in {".yml", ".yaml"}]
    named = {name for path in files for name in NAME.findall(path.read_text(encoding="utf-8"))}
    assert len(named) > 10
    assert named - known_names() == {"treegrpo_learner_idle_ratio"}, "that is the autoscaler's, made of a recording rule"


def test_every_metric_of_a_rule_is_recorded() -> None:
    rules = set(recorded())
    queries = [*panel_queries().values(), *(rule["expr"] for rule in alert_rules().values())]
    asked = {name for query in queries for name in re.findall(r"\brun(?:_\w+)?:\w+:\w+", query)}
    assert asked <= rules
    assert rules <= asked, "a rule that nobody asks for"


def test_every_panel_has_a_unique_title_a_unit_and_a_description() -> None:
    for board in BOARDS:
        titles = [panel.title for panel in board.panels]
        assert len(set(titles)) == len(titles), board.title
        assert all(panel.unit and panel.about.endswith(".") and panel.queries for panel in board.panels), board.title


def test_every_board_is_chosen_by_run_marked_and_linked_to_the_others() -> None:
    boards = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.iterdir()}
    assert set(boards) == {"run", "budget", "learning", "samplers", "services"}
    for name, board in boards.items():
        variables = [variable["name"] for variable in board["templating"]["list"]]
        assert variables == (["run", "sampler"] if name == "samplers" else ["run"]), name
        assert {link["url"] for link in board["links"]} == {f"/d/{boards[other]['uid']}" for other in set(boards) - {name}}
        assert all(link["includeVars"] and link["keepTime"] for link in board["links"])
        assert len(board["annotations"]["list"]) == len(annotation_queries())
        asks = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
        assert all('run=~"$run"' in ask for ask in asks), "a panel that shows runs that were not chosen"


def test_no_two_panels_cover_each_other() -> None:
    for path in FOLDER.iterdir():
        places = [panel["gridPos"] for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]]
        cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
        assert len(cells) == len(set(cells)), path.name


def test_every_alert_has_a_runbook_that_exists() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for name, rule in alert_rules().items():
        assert rule["annotations"]["runbook"].startswith(f"docs/operations.md#{name.lower()}: "), name
        assert f"### {name}\n" in page, name


def test_the_alert_of_two_policies_has_the_limit_of_screen_and_log() -> None:
    assert alert_rules()["MismatchAtLagZero"]["expr"] == f"treegrpo_kl_mismatch_lag0 > {MISMATCH_LIMIT}"


def test_every_alert_is_seen_to_fire() -> None:
    tests = yaml.safe_load((RULES / "alerts.test.yml").read_text(encoding="utf-8"))["tests"]
    fired = {
        row["labels"] for test in tests for ask in test["promql_expr_test"] for row in ask["exp_samples"] if row["value"] == 1
    }
    assert {f'{{alertname="{name}"}}' for name in alert_rules()} <= fired


def test_grafana_shows_what_an_annotation_is_above_0_at() -> None:
    """A filter like x % 20 == 0 would give the 0 that it looks for, and nothing would be shown."""
    for name, query in annotation_queries().items():
        assert ">" in query or query.endswith("* 1000"), name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool here (Debian: package prometheus)")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("check", "rules", "rules.yml", "alerts.yml"),
        ("test", "rules", "alerts.test.yml"),
    ],
)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=RULES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def plain(path: Path) -> dict[str, Any]:
    """A dashboard without what its annotations say to Prometheus' plugin alone, of which the schema knows nothing."""
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    for annotation in dashboard["annotations"]["list"]:
        for key in ("titleFormat", "useValueForTime", "target", "expr", "step"):
            del annotation[key]
    return dashboard


def test_grafanas_own_types_accept_the_dashboards(tmp_path: Path) -> None:
    """Compiled against @grafana/schema, which GRAFANA_SCHEMA names the node_modules of."""
    if not (modules := os.environ.get("GRAFANA_SCHEMA")):
        pytest.skip("GRAFANA_SCHEMA names no node_modules with @grafana/schema and typescript; .ci/run installs them")
    (tmp_path / "node_modules").symlink_to(Path(modules).absolute())
    literals = "\n".join(f"export const {path.stem}: Dashboard = {json.dumps(plain(path))};" for path in FOLDER.iterdir())
    (tmp_path / "check.ts").write_text(f'import type {{ Dashboard }} from "@grafana/schema";\n{literals}', encoding="utf-8")
    tsc = ["node", "node_modules/typescript/bin/tsc", "--noEmit", "--strict", "--skipLibCheck", "--moduleResolution", "bundler"]
    done = subprocess.run(
        [*tsc, "--module", "esnext", "--target", "es2022", "check.ts"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[:2000]
