"""Board: effects of optimiser steps on the policy."""

from deploy.grafana.model import Dashboard, Panel, PanelRow

LEARNING = Dashboard(
    "learning",
    "Learning",
    "Signal, trust region, divergence and staleness of the optimiser steps.",
    [
        PanelRow(
            "Signal",
            [
                Panel(
                    "Reward of a step",
                    "none",
                    {"mean": "treegrpo_train_reward_mean{@}", "standard deviation": "treegrpo_train_reward_std{@}"},
                    "Of the leaves of the last step.",
                ),
                Panel(
                    "Groups without signal",
                    "percentunit",
                    {"share": "treegrpo_zero_signal_groups_ratio{@}"},
                    "All leaves of the same reward; near 1 nothing is learnt.",
                ),
                Panel(
                    "Effective sample by advantage",
                    "percentunit",
                    {"inter_intra {{sign}}": "treegrpo_effective_sample_ratio{@}"},
                    "Effective share of the tokens, by the signs of inter-tree and intra-tree advantage; all is of all tokens.",
                ),
            ],
        ),
        PanelRow(
            "Policy",
            [
                Panel("Loss", "none", {"loss": "treegrpo_loss{@}"}, "Of the last step; near 0 by construction."),
                Panel("Entropy", "none", {"nats per token": "treegrpo_entropy{@}"}, "Falls slowly; at 0 nothing new is tried."),
                Panel(
                    "Gradient norm", "none", {"before clipping": "treegrpo_gradient_norm{@}"}, "Spikes that stay are a warning."
                ),
                Panel(
                    "Trust region",
                    "percentunit",
                    {"{{side}}": "treegrpo_clip_ratio{@}"},
                    "Share of the loss terms that it clips.",
                ),
                Panel(
                    "Correction",
                    "percentunit",
                    {"{{how}}": "treegrpo_corrected_ratio{@}"},
                    "Share of the terms that the correction for stale data capped or masked.",
                ),
                Panel("Learning rate", "sci", {"learning rate": "treegrpo_learning_rate{@}"}, "Of the last step."),
            ],
        ),
        PanelRow(
            "Divergence and staleness",
            [
                Panel(
                    "KL",
                    "none",
                    {
                        "to the reference": "treegrpo_kl_reference{@}",
                        "sampler to trainer": "treegrpo_kl_mismatch{@}",
                        "the same at lag 0": "treegrpo_kl_mismatch_lag0{@}",
                    },
                    "Nats per token. Sampler to trainer: lag and rounding; investigate above 0.02, at lag 0 above 0.01.",
                ),
                Panel(
                    "Largest log-ratio",
                    "none",
                    {"one token": "treegrpo_log_ratio_max{@}"},
                    "Largest |log π_trainer − log π_sampler| of a token.",
                ),
                Panel(
                    "Staleness",
                    "none",
                    {
                        "mean": "treegrpo_version_lag_mean{@}",
                        "max": "treegrpo_version_lag_max{@}",
                        "bound": "treegrpo_version_lag_bound{@}",
                    },
                    "Age of the trained tokens in versions.",
                ),
                Panel(
                    "Siblings of different versions",
                    "percentunit",
                    {"share": "treegrpo_mixed_version_siblings_ratio{@}"},
                    "Of the sibling sets.",
                ),
                Panel(
                    "Steps skipped",
                    "short",
                    {
                        "{{reason}}": "sum by (reason) (increase(treegrpo_steps_skipped_total{@}[5m])) or on () vector(0)",
                        "groups refused": "sum(increase(treegrpo_groups_refused_total{@}[5m]))",
                    },
                    "In 5 minutes: without signal, or a gradient that is not finite; and groups that validation refused.",
                ),
                Panel(
                    "Time of a step",
                    "s",
                    {
                        "{{phase}}": "sum by (phase) (rate(treegrpo_step_phase_seconds_sum{@}[5m])) / sum by (phase) (rate(treegrpo_step_phase_seconds_count{@}[5m]) > 0)"
                    },
                    "Mean seconds by phase.",
                ),
            ],
        ),
    ],
)
