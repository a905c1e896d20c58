"""Board: each sampler."""

from deploy.grafana.model import Dashboard, Panel, PanelRow

SAMPLERS = Dashboard(
    "samplers",
    "Samplers",
    "Per replica: tokens, generations, cache, weights, errors.",
    [
        PanelRow(
            "Work",
            [
                Panel(
                    "Decoded tokens per second",
                    "short",
                    {"{{instance}}": 'rate(treegrpo_engine_tokens_total{@s, how="decoded"}[1m])'},
                    "Of each engine.",
                ),
                Panel(
                    "Generations",
                    "none",
                    {
                        "{{instance}} running": "treegrpo_engine_running{@s}",
                        "{{instance}} queued": "treegrpo_engine_queued{@s}",
                        "{{instance}} may run": "treegrpo_engine_limit{@s}",
                    },
                    "Queued: waiting for the engine's limit of concurrent generations; with SGLang it follows its memory.",
                ),
                Panel(
                    "Without a lease",
                    "percentunit",
                    {"{{instance}}": "rate(treegrpo_sampler_waiting_seconds_total{@s}[5m])"},
                    "Share of the time; high: more samplers than the learner needs.",
                ),
                Panel("Leases", "none", {"{{instance}}": "treegrpo_sampler_leases{@s}"}, "Being worked on."),
                Panel(
                    "Subtrees not yet acked",
                    "none",
                    {"{{instance}}": "treegrpo_sampler_unacked_subtrees{@s}"},
                    "Sent again after a reconnection; grows while the learner is unavailable.",
                ),
                Panel(
                    "Time of a turn",
                    "s",
                    {
                        "{{part}} p50": "histogram_quantile(0.5, sum by (le, part) (rate(treegrpo_turn_seconds_bucket{@s}[5m])))",
                        "{{part}} p95": "histogram_quantile(0.95, sum by (le, part) (rate(treegrpo_turn_seconds_bucket{@s}[5m])))",
                    },
                    "Engine and environment.",
                ),
            ],
        ),
        PanelRow(
            "Cache",
            [
                Panel(
                    "Prefix hits",
                    "percentunit",
                    {
                        "{{instance}}": 'rate(treegrpo_engine_tokens_total{@s, how="cached"}[5m]) / on (run, instance) sum by (run, instance) (rate(treegrpo_engine_tokens_total{@s, how=~"cached|prefilled"}[5m]))'
                    },
                    "Share of the prompt tokens that were not computed.",
                ),
                Panel(
                    "Cache in use",
                    "percentunit",
                    {"{{instance}}": "treegrpo_engine_cache_used_tokens{@s} / treegrpo_engine_cache_size_tokens{@s}"},
                    "Of its tokens.",
                ),
                Panel(
                    "Evicted tokens per second",
                    "short",
                    {"{{instance}}": "rate(treegrpo_engine_cache_evicted_tokens_total{@s}[5m])"},
                    "High with few hits: engine.cache_tokens is too small.",
                ),
            ],
        ),
        PanelRow(
            "Weights and errors",
            [
                Panel(
                    "Versions behind",
                    "none",
                    {"{{instance}}": "scalar(max(treegrpo_policy_version_step{@})) - treegrpo_engine_version_step{@s}"},
                    "Newest published minus served; seldom above 1.",
                ),
                Panel(
                    "Time to new weights",
                    "s",
                    {
                        "fetch": "sum(rate(treegrpo_weights_fetch_seconds_sum{@s}[5m])) / sum(rate(treegrpo_weights_fetch_seconds_count{@s}[5m]) > 0)",
                        "swap": "sum(rate(treegrpo_weights_swap_seconds_sum{@s}[5m])) / sum(rate(treegrpo_weights_swap_seconds_count{@s}[5m]) > 0)",
                        "paused per minute": "60 * avg(rate(treegrpo_weights_stall_seconds_total{@s}[5m]))",
                    },
                    "Mean seconds to fetch a version and to swap to it; and the seconds of each minute that SGLang servers paused for it.",
                ),
                Panel(
                    "Updates that failed",
                    "short",
                    {"{{instance}} {{type}}": "increase(treegrpo_weights_updates_failed_total{@s}[5m]) or on () vector(0)"},
                    "In 5 minutes; each is retried.",
                ),
                Panel(
                    "Errors",
                    "short",
                    {
                        "{{type}}": "sum by (type) (increase(treegrpo_sampler_errors_total{@s}[5m])) or on () vector(0)",
                        "reconnects": "sum(increase(treegrpo_sampler_reconnects_total{@s}[5m]))",
                        "servers started again": "sum(increase(treegrpo_engine_restarts_total{@s}[5m]))",
                    },
                    "In 5 minutes. Each was retried, reported, or ended a lease.",
                ),
                Panel(
                    "Waiting for a tool or the engine",
                    "percentunit",
                    {"{{part}}": "sum by (part) (rate(treegrpo_sampler_away_seconds_total{@s}[5m])) or on () vector(0)"},
                    "Share of the time spent waiting for something unavailable.",
                ),
                Panel(
                    "No progress",
                    "s",
                    {"{{instance}} {{part}}": "treegrpo_sampler_stalled_seconds{@s} or on () vector(0)"},
                    "Seconds without progress, by the part that is missing; the sampler's log has the details.",
                ),
            ],
        ),
        PanelRow(
            "SGLang's own metrics",
            [
                Panel(
                    "SGLang requests",
                    "none",
                    {
                        "{{server}} running": "sglang:num_running_reqs{@s} or on () vector(0)",
                        "{{server}} queued": "sglang:num_queue_reqs{@s} or on () vector(0)",
                    },
                    "0 where the engine is another. Queued: beyond what the sampler meant to have running.",
                ),
                Panel(
                    "SGLang memory in use",
                    "percentunit",
                    {"{{server}}": "sglang:token_usage{@s} or on () vector(0)"},
                    "Keys and values held by running requests; the number of requests follows it.",
                ),
                Panel(
                    "SGLang tokens per second",
                    "short",
                    {"{{server}}": "sglang:gen_throughput{@s} or on () vector(0)"},
                    "Generated, of each server.",
                ),
                Panel(
                    "SGLang prefix hits",
                    "percentunit",
                    {
                        "{{server}}": 'sum by (server) (rate(sglang:realtime_tokens_total{@s, mode="prefill_cache"}[5m])) / '
                        'sum by (server) (rate(sglang:realtime_tokens_total{@s, mode=~"prefill_.*"}[5m])) or on () vector(0)'
                    },
                    "Share of the prompt tokens whose keys and values were cached.",
                ),
            ],
        ),
    ],
    by_sampler=True,
)
