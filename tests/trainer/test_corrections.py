from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.trainer.algorithm.corrections import correction_weights, effective_sample, m2po_limit, m2po_log_ratios, mismatch_sums
from learner.trainer.algorithm.metric_sums import MetricSums
from learner.trainer.algorithm.targets import SIGNS
from tests.trainer.target_builders import float64, lone, places
from treegrpo.config.loader import load_config
from treegrpo.config.train import OPTIONS, Correction, Estimator, Loss, TrainConfig
from treegrpo.errors import ConfigError

pytestmark = pytest.mark.pure

ICEPOP = ["--train.correction", "icepop"]
RHO = float64(0.25, 1.0, 3.0, 8.0)
SQUARES = st.lists(st.floats(0, 3).map(lambda x: x if x > 1e-6 else 0.0), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("correction", "weights", "capped", "masked"),
    [
        ("none", [1, 1, 1, 1], 0, 0),
        ("decoupled", [0.25, 1, 3, 8], 0, 0),
        ("tis", [0.25, 1, 2, 2], 2, 0),
        ("icepop", [0, 1, 3, 0], 0, 2),
        ("m2po", [0.25, 1, 3, 0], 0, 1),
    ],
)
def test_what_each_correction_makes_of_rho(correction: Any, weights: list[float], capped: int, masked: int) -> None:
    train = TrainConfig.model_validate({"correction": correction} | ({"m2po_tokens": "all"} if correction == "m2po" else {}))
    found = correction_weights(RHO.log(), train, m2po_limit=math.log(8) ** 2)
    assert found.rho_X.tolist() == pytest.approx(weights)
    assert (found.capped_X.sum().item(), found.masked_plus_X.sum().item()) == (capped, masked)
    assert found.masked_plus_X.tolist() == found.masked_minus_X.tolist()


def test_the_bounds_of_icepop_are_allowed_themselves() -> None:
    found = correction_weights(torch.zeros(1), TrainConfig(correction="icepop", icepop_low=1.0, icepop_high=2.0))
    assert found.rho_X.tolist() == [1.0]


def test_weights_have_no_gradient() -> None:
    log_rho = float64(0.1).requires_grad_()
    assert not correction_weights(log_rho, TrainConfig(correction="decoupled")).rho_X.requires_grad


def test_m2po_drops_the_largest_until_the_mean_of_the_others_fits() -> None:
    """Squares 0, .01, .04, .25, 1: the means of the first ones are 0, .005, .0167, .075, .26."""
    log_rho = float64(0.5, -0.1, 0.0, -1.0, 0.2)
    assert m2po_limit(log_rho, 0.04) == 0.25
    assert m2po_limit(log_rho, 0.08) == 1.0
    assert m2po_limit(log_rho, 0.3) == math.inf
    masked = correction_weights(
        log_rho, TrainConfig(correction="m2po", m2po_tokens="all"), m2po_limit(log_rho, 0.04)
    ).masked_plus_X
    assert masked.tolist() == [True, False, False, True, False]


def test_m2po_of_the_paper_masks_nothing_that_moved_back() -> None:
    """ρ = 4 and 1/4, each pulled up by one leaf and down by another: of each only the leaf that pulls on is masked."""
    log_rho = float64(4.0, 0.25).log()
    found = correction_weights(log_rho, TrainConfig(correction="m2po"), m2po_limit=1.0)
    assert (found.masked_plus_X.tolist(), found.masked_minus_X.tolist()) == ([True, False], [False, True])
    assert found.rho_X.tolist() == pytest.approx([4, 0.25])


def test_m2po_of_the_paper_measures_the_trust_region_alone() -> None:
    """Leaves (+1, −1) over tokens of log ρ 0.3, −0.1, 0: of the first leaf 0.3 counts, of the second −0.1; of all, all."""
    targets = places([-1.0] * 3, [[(0, 1.0), (1, 1.0), (2, 1.0)], [(0, -1.0), (1, -1.0)]], [0.5, 0.5])
    log_rho = float64(0.3, -0.1, 0.0)
    train = TrainConfig(correction="m2po")
    assert m2po_log_ratios(log_rho, targets, train).tolist() == [0.3, -0.1]
    assert m2po_log_ratios(log_rho, targets, train.model_copy(update={"m2po_tokens": "all"})).tolist() == [0.3, -0.1, 0.0]
    no_weight = places([-1.0] * 3, [[(0, 1.0)]], [0.0])
    assert m2po_log_ratios(log_rho, no_weight, train).tolist() == []


def test_m2po_lets_equals_share_a_fate() -> None:
    log_rho = float64(0.3, -0.3, 0.0)
    found = correction_weights(log_rho, TrainConfig(correction="m2po"), m2po_limit(log_rho, 0.05))
    assert (found.masked_plus_X | found.masked_minus_X).tolist() == [True, True, False]


def test_m2po_of_nothing_drops_nothing() -> None:
    assert m2po_limit(torch.zeros(0), 0.04) == math.inf


@given(SQUARES, st.floats(1e-3, 2), st.floats(1e-3, 2))
def test_m2po_keeps_what_fits_and_no_less_with_a_larger_tau(log_rho: list[float], one: float, other: float) -> None:
    values = float64(*log_rho)

    def kept(tau: float) -> set[int]:
        return set((values.square() < m2po_limit(values, tau)).nonzero()[:, 0].tolist())

    small, large = sorted((one, other))
    assert kept(small) <= kept(large)
    if within := kept(small):
        assert values[list(within)].square().mean().item() <= small * (1 + 1e-9)
    next_up = sorted(values.square().tolist())[: len(kept(small)) + 1]
    assert (
        len(kept(small)) == len(values) or math.fsum(next_up) / len(next_up) > small * (1 - 1e-9) or _tied(values.tolist(), small)
    )


def _tied(values: list[float], tau: float) -> bool:
    """Equal squares meet at the limit."""
    squares = sorted(value**2 for value in values)
    return squares.count(m2po_limit(float64(*values), tau)) > 1


def test_m2po_compares_in_float32_what_it_measured_in_float32() -> None:
    rng = torch.Generator().manual_seed(0)
    log_rho = torch.randn(1000, generator=rng)
    limit = m2po_limit(log_rho, 0.04)
    assert 0 < correction_weights(log_rho, TrainConfig(correction="m2po", m2po_tokens="all"), limit).masked_plus_X.sum() < 1000
    assert limit in log_rho.double().square().tolist()


def test_the_mismatch_is_nothing_when_sampler_and_trainer_agree() -> None:
    targets = lone([-1.0, -2.0], [1.0, 1.0])
    for shift, expected in ((0.0, 0.0), (0.1, 0.0051709)):
        sums = mismatch_sums(targets.sampled_A + shift, targets)
        assert sums.ratio("kl_mismatch", "actions") == pytest.approx(expected, abs=1e-6)
        assert sums.maximum("log_ratio_max") == pytest.approx(shift)


def test_the_mismatch_at_lag_0_covers_the_versions_own_tokens() -> None:
    """Of three tokens the second is of an older version and the third counted elsewhere."""
    targets = lone([-1.0, -1.0, -1.0], [1.0] * 3)
    targets.fresh_A[1], targets.counted_A[2] = False, False
    proximal = targets.sampled_A + float64(0.1, 2.0, 2.0)
    sums = mismatch_sums(proximal, targets)
    assert (sums["actions"], sums["actions_lag0"]) == (2, 1)
    assert sums["kl_mismatch_lag0"] == pytest.approx(math.exp(0.1) - 1.1)
    assert sums["kl_mismatch"] > 4
    moved = mismatch_sums(proximal, targets, at_start=False)
    assert (moved["actions_lag0"], moved["kl_mismatch_lag0"], moved["kl_mismatch"]) == (0, 0, sums["kl_mismatch"])


def test_the_effective_sample_is_summed_over_packs_before_the_division() -> None:
    """ρ 1, 3 in one pack and 2 in the next: (1 + 3 + 2)² / (3·(1 + 9 + 4)) = 6/7; the token that does not count is 9."""
    one, other = lone([0.0, 0.0, 0.0], [1.0] * 3), lone([0.0], [1.0])
    one.sign_A[:], other.sign_A[:] = torch.tensor([1, 2, 2]), 1
    one.counted_A[2] = False
    sums = mismatch_sums(float64(1.0, 3.0, 9.0).log(), one) + mismatch_sums(float64(2.0).log(), other)
    assert effective_sample(sums, *SIGNS) == pytest.approx(6 / 7)
    assert effective_sample(sums, "up_up") == pytest.approx(9 / (2 * 5))
    assert effective_sample(sums, "up_down") == pytest.approx(1.0)
    assert effective_sample(sums, "down_down") == 1.0
    assert sums["actions"] == 3
    assert sums.maximum("log_ratio_max") == pytest.approx(math.log(3))


def test_tallies_add_up_in_any_order_and_nothing_is_neutral() -> None:
    one, other = MetricSums({"a": 1.0, "b": 2.0}, {"x": 3.0}), MetricSums({"b": 5.0}, {"x": 1.0, "y": 4.0})
    assert one + other == other + one == MetricSums({"a": 1.0, "b": 7.0}, {"x": 3.0, "y": 4.0})
    assert one + MetricSums() == one
    broken = MetricSums({}, {"x": math.nan})
    assert all(math.isnan((a + b).maximum("x")) for a, b in ((one, broken), (broken, one)))
    assert (one.ratio("b", "a"), one.ratio("a", "nothing"), one.maximum("nothing")) == (2.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--train.loss", "gspo", "--train.correction", "m2po"], r"train\.correction = 'm2po'.*take icepop or tis"),
        (["--train.dual_clip", "0.5"], r"train\.dual_clip = '0\.5'.*above 1"),
        (["--train.loss", "dppo", "--train.dppo_cap", "1"], r"train\.dppo_cap = '1'.*above 1"),
        (["--train.dual_clip", "3", "--train.loss", "cispo"], r"train\.dual_clip.*only train\.loss = ppo uses it"),
        (
            [*ICEPOP, "--train.icepop_low", "6"],
            r"train\.icepop_high = 5\.0 \(the default\).*train\.icepop_low, which is 6\.0",
        ),
        ([*ICEPOP, "--train.icepop_low", "1", "--train.icepop_high", "1"], r"train\.icepop_high.*above train\.icepop_low"),
        (["--train.kl_coef", "0", "--train.kl_estimator", "k1"], r"train\.kl_estimator = 'k1'.*no penalty.*leave it out"),
        (["--train.loss", "gspo", "--train.clip_low", "0.2"], r"train\.clip_low = '0\.2'.*whole leaf.*at most 0\.05"),
        (["--train.loss", "gspo", "--train.clip_high", "0.06"], r"train\.clip_high = '0\.06'.*at most 0\.05"),
        (["--train.minibatches", "9", "--train.batch", "8"], r"train\.minibatches.*a batch of 8 groups"),
    ],
)
def test_keys_that_make_no_sense_together_are_refused(flags: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(None, flags)


@pytest.mark.parametrize(("loss", "low", "high"), [("ppo", 0.2, 0.2), ("gspo", 3e-4, 4e-4), ("cispo", 1.0, 0.2)])
def test_the_clips_follow_from_the_loss_unless_they_are_given(loss: str, low: float, high: float) -> None:
    train = load_config(None, ["--train.loss", loss]).train
    assert (train.clip_low, train.clip_high) == (low, high)
    assert load_config(None, ["--train.loss", loss, "--train.clip_high", "0.03"]).train.clip_high == 0.03


OTHERS: dict[str, Any] = {
    "clip_low": 0.01,
    "clip_high": 0.01,
    "dual_clip": 3.0,
    "dppo_delta": 0.1,
    "dppo_cap": 10.0,
    "tis_cap": 3.0,
    "icepop_low": 0.1,
    "icepop_high": 9.0,
    "m2po_tau": 0.1,
    "m2po_tokens": "all",
    "singleton": "raw",
    "std_floor": 0.1,
    "inter_weight": 0.5,
    "intra_weight": 0.5,
}
"""A value other than the default for each option that not every choice uses."""


@pytest.mark.parametrize(("key", "choices"), [("loss", Loss), ("correction", Correction), ("estimator", Estimator)])
def test_an_option_is_accepted_by_the_choices_that_use_it_and_by_no_other(key: str, choices: Any) -> None:
    table = OPTIONS[key]
    assert table.keys() <= set(get_args(choices))
    for choice, option in itertools.product(get_args(choices), set[str]().union(*table.values())):
        flags = [f"--train.{key}", choice, f"--train.{option}", str(OTHERS[option])]
        if option in table.get(choice, set()):
            assert getattr(load_config(None, flags).train, option) == OTHERS[option]
        else:
            with pytest.raises(ConfigError, match=rf"train\.{option} = .*only train\.{key} = .*{key} is {choice}; leave it out"):
                load_config(None, flags)


def test_an_option_of_another_choice_may_have_its_default() -> None:
    """So it is in a configuration that was written out whole."""
    assert load_config(None, ["--train.tis_cap", "2", "--train.loss", "dppo", "--train.clip_low", "0.2"]).train.loss == "dppo"
