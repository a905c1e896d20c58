"""The metrics of all services in one place: names, help texts, units.

Base units (seconds, bytes, tokens); counters end in `_total`, shares in `_ratio`. Labels have few values (a currency,
a lease kind, a phase, an error type), never a question or a lease. Each service builds its own set once and serves it
with `serve_metrics`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

from treegrpo.core.lease import LeaseEndReason, LeaseKind
from treegrpo.net.address import address_family, check_free, split_address
from treegrpo.observability.metrics_server import LIMITS, ScrapeLimits, start_metrics_server
from treegrpo.security.credentials import Credentials

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

MISMATCH_LIMIT = 0.01
"""Nats per token of `kl_mismatch_lag0`: above it sampler and trainer compute different policies. bfloat16 stays far below."""


class _Metrics:
    """A service's own registry and shorthands to fill it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.refresh: Callable[[], None] = lambda: None
        """Called before each scrape, in its thread: updates metrics that are not counted as they happen."""
        self.registry.register(_RefreshOnScrape(self))
        self.serving = self._gauge("serving", "1 while the process does its work, as /health says")
        self._gauge("start_time_seconds", "Unix time at which the process started").set_to_current_time()
        self.scrapes_refused = self._counter("scrapes_refused", "Requests for /metrics refused, by reason", "reason")

    @property
    def is_serving(self) -> bool:
        """The value of `serving`, without collecting all other metrics."""
        return next(sample.value for family in self.serving.collect() for sample in family.samples) == 1

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"treegrpo_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"treegrpo_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"treegrpo_{name}", text, labels, registry=self.registry, buckets=SECONDS)


class _RefreshOnScrape(Collector):
    """The first collector of the registry: calls `refresh` at each scrape, and has no metrics itself."""

    def __init__(self, metrics: _Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        self._metrics.refresh()
        return ()


class RelayedMetrics(Collector):
    """Relays the metrics of other servers to Prometheus, with the label ``server``."""

    def __init__(self) -> None:
        self.families: Mapping[str, Sequence[Metric]] = {}
        """By server."""

    def collect(self) -> Iterable[Metric]:
        merged: dict[str, Metric] = {}
        for server, families in self.families.items():
            for family in families:
                same = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    same.add_sample(sample.name, {**sample.labels, "server": server}, sample.value)
        return merged.values()


class IntakeMetrics(_Metrics):
    """`kind` is train or eval, `currency` tokens or tool_calls."""

    def __init__(self) -> None:
        super().__init__()
        account = ("kind", "currency")
        why = ("kind", "reason")
        self.granted = self._counter("budget_granted", "Rollout budget granted to leases", *account)
        self.spent = self._counter("budget_spent", "Rollout budget spent by accepted work", *account)
        self.refunded = self._counter("budget_refunded", "Rollout budget that ended leases returned unspent", *account)
        self.forfeited = self._counter("budget_forfeited", "Rollout budget of lost leases whose spending is unknown", *account)
        self.outstanding = self._gauge("budget_outstanding", "Rollout budget of open leases not yet spent", *account)
        self.tokens = self._counter("rollout_tokens", "Tokens of accepted steps: prefilled, cached or decoded", "kind", "how")
        self.prefix = self._counter(
            "rollout_prefix_tokens", "Tokens of the prefixes of turns, by depth: cached or prefilled", "depth", "how"
        )
        self.unique = self._counter("rollout_unique_tokens", "Tokens of closed groups, each shared prefix counted once", "kind")
        self.chain = self._counter("rollout_chain_equivalent", "Cost of separate chains to the same leaves", *account)
        self.saving = self._gauge("rollout_saving_ratio", "1 - needed by trees / needed by chains to the same leaves", *account)
        self.recomputed = self._gauge(
            "rollout_recomputed_ratio", "Share of the spent tokens that had been computed before", "kind"
        )
        self.leaves = self._counter("rollout_leaves", "Leaves accepted", "kind")
        self.failed_steps = self._counter("rollout_failed_steps", "Steps dropped after an error", "status")
        self.forgone = self._counter("rollout_forgone_expansions", "Planned expansions missing in closed groups", "kind")
        self.dropped = self._counter(
            "rollout_leaves_dropped", "Leaves dropped because they arrived after their group was closed", "reason"
        )
        self.ended = self._counter("leases_ended", "Leases ended, by reason", "kind", "reason")
        for kind in LeaseKind:
            for reason in LeaseEndReason:  # from 0, since a rate does not see what a series begins with
                self.ended.labels(kind.value, reason.value)
        self.groups = self._counter(
            "groups_closed", "Groups closed, by reason: overdue at the staleness bound, else the end of their lease", *why
        )
        self.set_aside = self._counter(
            "groups_set_aside", "Groups set aside after several attempts, or too stale to be trained, by reason", *why
        )
        self.zero_signal = self._counter("groups_zero_signal", "Training groups whose leaves all have the same reward")
        self.leases = self._gauge("leases_outstanding", "Open leases", "kind")
        self.lease_limit = self._gauge("leases_limit", "Training leases that the staleness bound allows now")
        self.ready = self._gauge("groups_ready", "Closed groups that are ready for training or in training")
        self.samplers = self._gauge("samplers_connected", "Samplers with an open stream")
        self.put_aside = self._gauge(
            "samplers_put_aside", "Connected samplers that get no leases because their last leases all failed"
        )
        self.stalled = self._gauge("stalled_seconds", "Seconds without progress, by what is waited for", "waiting_for")
        self.subtree_seconds = self._histogram("subtree_seconds", "Seconds from lease to accepted subtree")
        self.reward = self._gauge("reward_mean", "Mean reward of the leaves of the last groups", "kind")
        self.em = self._gauge("exact_match_ratio", "Share of leaves with an exact match in the last groups", "kind")
        self.duplicates = self._counter("subtrees_duplicate", "Duplicate subtrees, which are not counted again")
        self.refused = self._counter("subtrees_refused", "Subtrees refused, by reason", "reason")
        self.peers_refused = self._counter("peers_refused", "Calls and streams refused, by reason", "reason")
        self.handshakes = self._counter("tls_handshakes", "TLS handshakes started")
        self.connections = self._counter("tls_connections", "TLS connections with at least one call; failed handshakes have none")
        self.weight_bytes = self._counter("weights_served_bytes", "Bytes of weight files sent to samplers")
        self.journal_blocked = self._gauge(
            "journal_blocked", "1 while the disk refuses the journal: no acknowledgements, no leases"
        )
        self.journal_short = self._gauge("journal_short", "1 while free disk space for the journal is low: no leases")
        self.journal_bytes = self._gauge("journal_bytes", "Bytes of the journal's segments")
        self.journal_free = self._gauge("journal_free_bytes", "Free bytes on the journal's disk")


class TrainerMetrics(_Metrics):
    def __init__(self) -> None:
        super().__init__()
        self.step = self._gauge("step", "Optimiser steps done")
        self.version = self._gauge("policy_version_step", "Step of the newest published policy version")
        self.phase = self._histogram("step_phase_seconds", "Seconds of one step by phase", "phase")
        self.waiting = self._counter("learner_waiting_seconds", "Seconds the trainer waited for groups")
        self.skipped = self._counter("steps_skipped", "Steps whose gradient was not applied: no_signal or not_finite", "reason")
        self.unwritten = self._counter(
            "trainer_writes_failed", "Attempts to write weights, a checkpoint or final that the disk refused", "what", "error"
        )
        self.blocked = self._gauge("trainer_blocked", "1 while the trainer waits because the disk refuses a write")
        self.trained_tokens = self._counter("trained_tokens", "Tokens of forward and backward passes in training")
        self.token_ratio = self._gauge("trained_token_ratio", "Tokens of the last step's paths over its trained tokens")
        self.reward = self._gauge("train_reward_mean", "Mean reward of the leaves of the last step")
        self.reward_std = self._gauge("train_reward_std", "Standard deviation of the reward of the last step's leaves")
        self.loss = self._gauge("loss", "Loss of the last step")
        self.kl = self._gauge("kl_reference", "K3 estimate of KL(policy ‖ reference), nats per token")
        self.mismatch = self._gauge("kl_mismatch", "K3 estimate of KL(sampler ‖ trainer), nats per token")
        self.mismatch_lag0 = self._gauge(
            "kl_mismatch_lag0", "kl_mismatch over the tokens that the trained version itself sampled"
        )
        self.log_ratio = self._gauge("log_ratio_max", "Largest |log π_trainer − log π_sampler| of a token of the last step")
        self.effective = self._gauge(
            "effective_sample_ratio", "Effective share of the sampled tokens, by signs of inter- and intra-tree advantage", "sign"
        )
        self.entropy = self._gauge("entropy", "Mean entropy of the policy at the trained action tokens, nats")
        self.clip = self._gauge("clip_ratio", "Share of the loss terms clipped by the trust region: low, high or dual", "side")
        self.corrected = self._gauge("corrected_ratio", "Share of the loss terms that the correction capped or masked", "how")
        self.grad_norm = self._gauge("gradient_norm", "Norm of the gradient before clipping")
        self.lr = self._gauge("learning_rate", "Learning rate of the last step")
        self.lag_mean = self._gauge("version_lag_mean", "Mean age of the trained tokens, in versions")
        self.lag_max = self._gauge("version_lag_max", "Age of the oldest trained token, in versions")
        self.lag_bound = self._gauge("version_lag_bound", "Upper bound of the age of trained tokens: train.max_lag, in versions")
        self.mixed = self._gauge("mixed_version_siblings_ratio", "Share of sibling sets sampled from different versions")
        self.refused = self._counter("groups_refused", "Groups not trained because validation refused them")
        self.zero_signal = self._gauge("zero_signal_groups_ratio", "Share of the step's groups without a learning signal")


class SamplerMetrics(_Metrics):
    def __init__(self) -> None:
        super().__init__()
        self.servers = RelayedMetrics()
        self.registry.register(self.servers)
        self.tokens = self._counter("engine_tokens", "Tokens of the engine by how: prefilled, cached, decoded", "how")
        self.running = self._gauge("engine_running", "Generations running")
        self.queued = self._gauge("engine_queued", "Generations queued")
        self.limit = self._gauge("engine_limit", "Limit of concurrent generations now; with SGLang it follows its memory")
        self.stalled_for_weights = self._counter("weights_stall_seconds", "Seconds that SGLang servers paused for new weights")
        self.restarts = self._counter("engine_restarts", "Restarts of a server of the engine")
        self.cache_used = self._gauge("engine_cache_used_tokens", "Tokens held by the prefix cache; with SGLang by generations")
        self.cache_size = self._gauge("engine_cache_size_tokens", "Tokens the prefix cache can hold")
        self.cache_evicted = self._counter("engine_cache_evicted_tokens", "Tokens evicted from the prefix cache")
        self.version = self._gauge("engine_version_step", "Step of the policy version being served")
        self.swap = self._histogram("weights_swap_seconds", "Seconds from the start of a weight swap to its end")
        self.fetch = self._histogram("weights_fetch_seconds", "Seconds to fetch a policy version")
        self.not_updated = self._counter(
            "weights_updates_failed", "Attempts to serve a newer policy version that failed, by type of error", "type"
        )
        self.fetched_bytes = self._counter("weights_fetched_bytes", "Bytes of weight files fetched")
        self.waiting = self._counter("sampler_waiting_seconds", "Seconds without any lease")
        self.leases = self._gauge("sampler_leases", "Leases in progress")
        self.unacked = self._gauge("sampler_unacked_subtrees", "Subtrees sent and not yet acknowledged")
        self.away = self._counter("sampler_away_seconds", "Seconds of waiting for an unavailable tool or engine", "part")
        self.stalled = self._gauge("sampler_stalled_seconds", "Seconds without progress, by the part that is missing", "part")
        self.errors = self._counter("sampler_errors", "Errors by type; each was retried, reported or ended a lease", "type")
        self.reconnects = self._counter("sampler_reconnects", "Reconnections of the stream to the learner")
        self.turn = self._histogram("turn_seconds", "Seconds of one agent turn by part", "part")


class RetrieverMetrics(_Metrics):
    def __init__(self) -> None:
        super().__init__()
        self.queries = self._counter("retriever_queries", "Queries answered")
        self.refused = self._counter("retriever_refused", "Requests and connections refused, by reason", "reason")
        self.seconds = self._histogram("retriever_seconds", "Seconds to answer a request")
        self.documents = self._gauge("retriever_documents", "Documents in the index")


def serve_metrics(metrics: _Metrics, address: str, key: str, access: Credentials, limits: ScrapeLimits = LIMITS) -> int:
    """Serve /metrics and /health from a thread until the process ends; returns the port.

    Raises:
        ConfigError: ``address`` is within reach of others, and TLS or the token is missing.
        AddressInUseError: ``address`` is taken.
    """
    access.check_metrics(key, address)
    host, port = split_address(address, key)
    check_free(address, key)
    listener = socket.create_server((host, port), family=address_family(host))
    start_metrics_server(
        listener,
        lambda: generate_latest(metrics.registry),
        lambda: metrics.is_serving,
        access.server_context(),
        access.metrics_token,
        refused=lambda reason: metrics.scrapes_refused.labels(reason).inc(),
        limits=limits,
    )
    return listener.getsockname()[1]
