from __future__ import annotations

import json
from typing import Any

import pytest

from learner.trainer.algorithm.credit_assignment import select_usable
from learner.trainer.algorithm.metric_sums import MetricSums
from learner.trainer.optimizer_steps import Update
from learner.trainer.persistence.checkpoint import TrainingProgress
from learner.trainer.step_metrics import MismatchMonitor, PhaseTimer, export_step, step_record
from tests.trainer.builders import forked, group
from treegrpo.observability.metrics import TrainerMetrics

pytestmark = pytest.mark.pure

SUMS = MetricSums(
    {
        "tokens": 30,
        "path_tokens": 75,
        "actions": 10,
        "terms": 20,
        "kl_mismatch": 0.5,
        "kl_mismatch_lag0": 0.1,
        "actions_lag0": 4,
        "kl_reference": 2.0,
        "entropy": 15.0,
        "clip_low": 1,
        "clip_high": 2,
        "clip_dual": 3,
        "capped": 4,
        "masked": 5,
        "count/none": 1,
        "rho/none": 3,
        "square/none": 9,
        "count/up_down": 2,
        "rho/up_down": 4,
        "square/up_down": 10,
    },
    {"log_ratio_max": 1.25},
)


def values(update: Update) -> dict[str, Any]:
    groups = [group(forked((1.0, 0.0))), group(forked((0.0, 0.0)))]
    return step_record(TrainingProgress(step=3, position=2), groups, select_usable(groups), update, PhaseTimer())


def test_shares_are_of_the_right_whole() -> None:
    found = values(Update(("applied",), 0.25, 1.5, 1e-6, SUMS))
    expected = {
        "tokens": 30,
        "token_ratio": 2.5,
        "kl_mismatch": 0.05,
        "kl_mismatch_lag0": 0.025,
        "kl_reference": 0.2,
        "entropy": 1.5,
        "clip_low_ratio": 0.05,
        "clip_high_ratio": 0.1,
        "clip_dual_ratio": 0.15,
        "capped_ratio": 0.2,
        "masked_ratio": 0.25,
        "effective_sample_ratio": 49 / (3 * 19),
        "effective_sample_up_down_ratio": 16 / (2 * 10),
        "log_ratio_max": 1.25,
        "zero_signal_ratio": 0.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_a_step_without_tokens_has_a_record_too() -> None:
    found = values(Update(("no_signal",), 0.0, 0.0, 1e-6, MetricSums()))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["tokens"], found["loss"]) == (0, 0.0)
    assert found.keys() & {*SUMS.totals, *SUMS.maxima} == {"tokens"}
    assert not any(name.startswith(("effective", "clip", "capped", "masked", "token_")) for name in found)


def test_a_step_without_groups_says_nothing_of_leaves_and_versions() -> None:
    nothing = Update(("no_signal",), 0.0, 0.0, 1e-6, MetricSums())
    found = step_record(TrainingProgress(step=3, position=2), [], [], nothing, PhaseTimer())
    measured = {"reward_mean", "reward_std", "em", "zero_signal_ratio", "lag_mean", "lag_max", "mixed_siblings_ratio"}
    assert measured <= values(nothing).keys()
    assert not measured & found.keys()
    assert (found["groups"], found["leaves"]) == (0, 0)


def test_a_class_of_tokens_or_a_reference_that_is_not_there_has_no_figure() -> None:
    without = MetricSums({name: value for name, value in SUMS.totals.items() if name != "kl_reference"}, SUMS.maxima)
    found = values(Update(("applied",), 0.25, 1.5, 1e-6, without))
    assert "effective_sample_up_down_ratio" in found
    assert not found.keys() & {"effective_sample_up_up_ratio", "kl_reference"}


def test_the_record_is_on_the_metrics_page() -> None:
    metrics = TrainerMetrics()
    export_step(metrics, values(Update(("applied", "not_finite", "no_signal", "not_finite"), 0.25, 1.5, 1e-6, SUMS)))
    expected = {
        ("treegrpo_effective_sample_ratio", ("sign", "all")): 49 / 57,
        ("treegrpo_effective_sample_ratio", ("sign", "up_down")): 0.8,
        ("treegrpo_clip_ratio", ("side", "low")): 0.05,
        ("treegrpo_clip_ratio", ("side", "dual")): 0.15,
        ("treegrpo_corrected_ratio", ("how", "capped")): 0.2,
        ("treegrpo_corrected_ratio", ("how", "masked")): 0.25,
        ("treegrpo_steps_skipped_total", ("reason", "not_finite")): 2,
        ("treegrpo_steps_skipped_total", ("reason", "no_signal")): 1,
    }
    found = {(name, label): metrics.registry.get_sample_value(name, dict([label])) for name, label in expected}
    assert found == pytest.approx(expected)
    assert metrics.registry.get_sample_value("treegrpo_log_ratio_max") == 1.25
    assert metrics.registry.get_sample_value("treegrpo_trained_tokens_total") == 30


def test_two_policies_are_logged_once_until_they_agree(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    watch = MismatchMonitor()
    for found in ({"kl_mismatch_lag0": 1e-7}, {"kl_mismatch_lag0": 0.056}, {}, {"kl_mismatch_lag0": 0.05}):
        watch.check_mismatch(found)
    assert [(row.levelname, row.message.split(" at ")[0]) for row in caplog.records] == [
        ("ERROR", "Sampler and trainer compute two policies: KL(sampler ‖ trainer) is 0.056 nats per token"),
    ]
    watch.check_mismatch({"kl_mismatch_lag0": 0.001})
    assert "agree again at lag 0: 0.001" in caplog.text


def test_what_was_not_measured_leaves_its_gauge_alone() -> None:
    metrics = TrainerMetrics()
    export_step(metrics, values(Update(("no_signal",), 0.0, 0.0, 1e-6, MetricSums())))
    assert metrics.registry.get_sample_value("treegrpo_clip_ratio", {"side": "low"}) is None
    assert metrics.registry.get_sample_value("treegrpo_effective_sample_ratio", {"sign": "all"}) is None
    export_step(metrics, values(Update(("applied",), 0.25, 1.5, 1e-6, SUMS)))
    export_step(metrics, values(Update(("no_signal",), 0.0, 0.0, 1e-6, MetricSums())))
    assert metrics.registry.get_sample_value("treegrpo_entropy") == 1.5
    assert metrics.registry.get_sample_value("treegrpo_loss") == 0.0
    assert metrics.registry.get_sample_value("treegrpo_effective_sample_ratio", {"sign": "down_down"}) is None
