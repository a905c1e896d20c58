"""Board: health of the run."""

from deploy.grafana.model import Dashboard, Panel, PanelRow, stat_panel

RUN = Dashboard(
    "run",
    "Run",
    "Health at a glance: reward, exact match, budget, saving, throughput, lag, and waiting times.",
    [
        PanelRow(
            "At a glance",
            [
                stat_panel("Step", "none", "max(treegrpo_step{@})", "Optimiser steps done."),
                stat_panel("Reward now", "none", 'avg(treegrpo_reward_mean{@, kind="train"})', "Mean reward of the last groups."),
                stat_panel(
                    "Held-out EM", "percentunit", 'avg(treegrpo_exact_match_ratio{@, kind="eval"})', "Of the last evaluation."
                ),
                stat_panel(
                    "Tokens saved",
                    "percentunit",
                    'avg(treegrpo_rollout_saving_ratio{@, kind="train", currency="tokens"})',
                    "Against independent chains to the same leaves.",
                ),
                stat_panel("Samplers", "none", "sum(treegrpo_samplers_connected{@})", "With an open stream to the learner."),
                stat_panel(
                    "Alerts",
                    "none",
                    'count(ALERTS{@, alertstate="firing"}) or vector(0)',
                    "Firing now; docs/operations.md has a section for each.",
                ),
            ],
        ),
        PanelRow(
            "Does it learn?",
            [
                Panel(
                    "Reward",
                    "none",
                    {"{{kind}}": "treegrpo_reward_mean{@}", "spread of a step": "treegrpo_train_reward_std{@}"},
                    "Rises. A spread of 0 teaches nothing.",
                ),
                Panel(
                    "Exact match",
                    "percentunit",
                    {"{{kind}}": "treegrpo_exact_match_ratio{@}"},
                    "Of the last groups, and of the last evaluation.",
                ),
                Panel(
                    "Version lag",
                    "none",
                    {
                        "mean": "treegrpo_version_lag_mean{@}",
                        "max": "treegrpo_version_lag_max{@}",
                        "bound": "treegrpo_version_lag_bound{@}",
                    },
                    "Age of the trained tokens in versions; never above the bound.",
                ),
            ],
        ),
        PanelRow(
            "Does it get on?",
            [
                Panel(
                    "Throughput",
                    "short",
                    {"sampled tokens/s": "run:sampled_tokens:rate1m{@}", "trained tokens/s": "run:trained_tokens:rate1m{@}"},
                    "Decoded by all samplers; computed by the trainer.",
                ),
                Panel(
                    "Who waits",
                    "percentunit",
                    {"learner": "run:learner_idle:ratio_rate5m{@}", "samplers": "run:sampler_idle:ratio_rate5m{@}"},
                    "Share of the time without groups, and without a lease. Both low: well sized.",
                ),
                Panel(
                    "Waited for",
                    "s",
                    {"{{waiting_for}}": "max by (waiting_for) (treegrpo_stalled_seconds{@})"},
                    "Seconds without progress, by what is waited for; the learner's log has the details.",
                ),
                Panel(
                    "Steps",
                    "short",
                    {"steps per minute": '60 * rate(treegrpo_step_phase_seconds_count{@, phase="update"}[5m])'},
                    "Optimiser steps per minute.",
                    width=6,
                ),
                Panel(
                    "Budget spent",
                    "short",
                    {"{{currency}} per second": 'sum by (currency) (rate(treegrpo_budget_spent_total{@, kind="train"}[5m]))'},
                    "Tokens and tool calls by accepted work.",
                    width=6,
                ),
                Panel(
                    "Saving",
                    "percentunit",
                    {
                        "{{currency}}": 'treegrpo_rollout_saving_ratio{@, kind="train"}',
                        "computed again": 'treegrpo_rollout_recomputed_ratio{@, kind="train"}',
                        "prefix hits": "run:prefix_hit:ratio_rate5m{@}",
                    },
                    "Against chains to the same leaves; the share computed again under new weights, and the share of prompt tokens found in caches.",
                    width=6,
                ),
                Panel(
                    "Leases and groups",
                    "none",
                    {
                        "leases out": 'sum(treegrpo_leases_outstanding{@, kind="train"})',
                        "may be out": "sum(treegrpo_leases_limit{@})",
                        "groups ready or in training": "sum(treegrpo_groups_ready{@})",
                    },
                    "Leases are as many as the staleness bound allows.",
                    width=6,
                ),
            ],
        ),
    ],
)
