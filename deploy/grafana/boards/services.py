"""Board: intake, disk, broker and retriever."""

from deploy.grafana.model import Dashboard, Panel, PanelRow

SERVICES = Dashboard(
    "services",
    "Services",
    "gRPC, journal, weights, control plane, retriever, and which processes serve.",
    [
        PanelRow(
            "Serving processes",
            [
                Panel("Serving", "none", {"{{job}} {{instance}}": "treegrpo_serving{@}"}, "1: /health says so."),
                Panel("Scraped", "none", {"{{job}}": "sum by (job) (up{@})"}, "Addresses that answered Prometheus, by job."),
                Panel(
                    "Samplers connected",
                    "none",
                    {"samplers": "treegrpo_samplers_connected{@}"},
                    "With an open stream over gRPC; their presence is published on the broker.",
                ),
            ],
        ),
        PanelRow(
            "gRPC",
            [
                Panel(
                    "From lease to subtree",
                    "s",
                    {
                        "p50": "histogram_quantile(0.5, sum by (le) (rate(treegrpo_subtree_seconds_bucket{@}[5m])))",
                        "p95": "histogram_quantile(0.95, sum by (le) (rate(treegrpo_subtree_seconds_bucket{@}[5m])))",
                    },
                    "Seconds until an accepted subtree came in.",
                ),
                Panel(
                    "Subtrees",
                    "short",
                    {
                        "accepted/s": "sum(rate(treegrpo_subtree_seconds_count{@}[1m]))",
                        "again/s": "sum(rate(treegrpo_subtrees_duplicate_total{@}[1m]))",
                        "refused/s": "sum(rate(treegrpo_subtrees_refused_total{@}[1m])) or vector(0)",
                    },
                    "Duplicates: sent again after a reconnection, and counted once.",
                ),
                Panel(
                    "Connections",
                    "short",
                    {
                        "handshakes/s": "sum(rate(treegrpo_tls_handshakes_total{@}[5m]))",
                        "with a call/s": "sum(rate(treegrpo_tls_connections_total{@}[5m]))",
                    },
                    "Handshakes without a following call: a certificate is refused.",
                ),
                Panel(
                    "Refused",
                    "short",
                    {
                        "calls and streams/s: {{reason}}": "sum by (reason) (rate(treegrpo_peers_refused_total{@}[5m])) or on () vector(0)",
                        "/metrics/s": "sum(rate(treegrpo_scrapes_refused_total{@}[5m])) or vector(0)",
                    },
                    "By reason; 0 when all is well.",
                ),
                Panel(
                    "Leases ended",
                    "short",
                    {"{{reason}}": "sum by (reason) (rate(treegrpo_leases_ended_total{@}[5m]))"},
                    "Per second, by reason.",
                ),
                Panel(
                    "Weights",
                    "Bps",
                    {
                        "served": "sum(rate(treegrpo_weights_served_bytes_total{@}[1m]))",
                        "fetched": "sum(rate(treegrpo_weights_fetched_bytes_total{@}[1m]))",
                    },
                    "Bytes per second from the learner to samplers.",
                ),
            ],
        ),
        PanelRow(
            "Disks",
            [
                Panel("Journal", "bytes", {"size": "treegrpo_journal_bytes{@}"}, "Goes down after checkpoints.", width=6),
                Panel(
                    "Free on its disk",
                    "bytes",
                    {"free": "treegrpo_journal_free_bytes{@}"},
                    "At 0 the run waits, and loses nothing.",
                    width=6,
                ),
                Panel(
                    "Full",
                    "none",
                    {
                        "no acks": "treegrpo_journal_blocked{@}",
                        "no new leases": "treegrpo_journal_short{@}",
                        "no next step": "treegrpo_trainer_blocked{@}",
                    },
                    "1 while the disk refuses the journal, has no room to spare for it, or refuses what the trainer has to write.",
                    width=6,
                ),
                Panel(
                    "Writes of the trainer that failed",
                    "short",
                    {"{{what}} {{error}}": "increase(treegrpo_trainer_writes_failed_total{@}[5m]) or on () vector(0)"},
                    "In 5 minutes: weights, a checkpoint or the final model that the disk refused.",
                    width=6,
                ),
            ],
        ),
        PanelRow(
            "Retriever",
            [
                Panel(
                    "Queries",
                    "short",
                    {
                        "answered/s": "sum(rate(treegrpo_retriever_queries_total{@}[1m]))",
                        "refused/s": "sum(rate(treegrpo_retriever_refused_total{@}[1m])) or vector(0)",
                    },
                    "Per second.",
                ),
                Panel(
                    "Time of an answer",
                    "s",
                    {
                        "p50": "histogram_quantile(0.5, sum by (le) (rate(treegrpo_retriever_seconds_bucket{@}[5m])))",
                        "p95": "histogram_quantile(0.95, sum by (le) (rate(treegrpo_retriever_seconds_bucket{@}[5m])))",
                    },
                    "Seconds.",
                ),
                Panel("Documents", "short", {"documents": "treegrpo_retriever_documents{@}"}, "In the index."),
            ],
        ),
    ],
)
