"""Board: use of the rollout budget."""

from deploy.grafana.model import Dashboard, Panel, PanelRow, stat_panel

ACCOUNTS = {
    account: f'sum(treegrpo_budget_{account}{{@, kind="train", currency="CURRENCY"}})'
    for account in ("spent_total", "refunded_total", "forfeited_total", "outstanding")
}


def accounts(currency: str) -> dict[str, str]:
    """The accounts whose sum is what was granted."""
    return {account.removesuffix("_total"): query.replace("CURRENCY", currency) for account, query in ACCOUNTS.items()}


def per_useful_leaf(currency: str) -> str:
    """Spent for a leaf of a group whose leaves differ in reward."""
    leaves = 'sum(treegrpo_rollout_leaves_total{@, kind="train"})'
    return f'sum(treegrpo_budget_spent_total{{@, kind="train", currency="{currency}"}}) / ({leaves} * avg(run:useful_leaves:ratio{{@}}))'


BUDGET = Dashboard(
    "budget",
    "Rollout budget",
    "Budget granted, its use, and what trees save against chains.",
    [
        PanelRow(
            "At a glance",
            [
                stat_panel(
                    "Tokens granted",
                    "short",
                    'sum(treegrpo_budget_granted_total{@, kind="train", currency="tokens"})',
                    "To training leases.",
                ),
                stat_panel(
                    "Tokens spent",
                    "short",
                    'sum(treegrpo_budget_spent_total{@, kind="train", currency="tokens"})',
                    "Computed: prefilled and decoded.",
                ),
                stat_panel(
                    "Tool calls spent",
                    "short",
                    'sum(treegrpo_budget_spent_total{@, kind="train", currency="tool_calls"})',
                    "By training leases.",
                ),
                stat_panel(
                    "Tokens saved",
                    "percentunit",
                    'avg(treegrpo_rollout_saving_ratio{@, kind="train", currency="tokens"})',
                    "Against chains to the same leaves.",
                ),
                stat_panel(
                    "Calls saved",
                    "percentunit",
                    'avg(treegrpo_rollout_saving_ratio{@, kind="train", currency="tool_calls"})',
                    "Against chains to the same leaves.",
                ),
                stat_panel(
                    "Imbalance",
                    "short",
                    "max(run_kind_currency:budget_imbalance:abs{@})",
                    "granted − spent − refunded − forfeited − outstanding: 0, always.",
                ),
            ],
        ),
        PanelRow(
            "The ledger",
            [
                Panel(
                    "Tokens",
                    "short",
                    accounts("tokens"),
                    "Use of the tokens granted to training leases.",
                    width=12,
                    stacked=True,
                ),
                Panel("Tool calls", "short", accounts("tool_calls"), "The same of tool calls.", width=12, stacked=True),
            ],
        ),
        PanelRow(
            "What it buys",
            [
                Panel(
                    "Tokens per useful leaf",
                    "short",
                    {"tokens": per_useful_leaf("tokens")},
                    "Useful: of a group whose leaves differ in reward.",
                ),
                Panel("Calls per useful leaf", "short", {"tool calls": per_useful_leaf("tool_calls")}, "The same in tool calls."),
                Panel(
                    "Saving",
                    "percentunit",
                    {
                        "{{currency}}": 'treegrpo_rollout_saving_ratio{@, kind="train"}',
                        "trained tokens": "1 - 1 / (treegrpo_trained_token_ratio{@} > 0)",
                    },
                    "1 − needed by trees / needed by chains to the same leaves; of the trainer, by packing shared prefixes once.",
                ),
                Panel(
                    "Trees against chains",
                    "short",
                    {
                        "spent": 'sum(rate(treegrpo_budget_spent_total{@, kind="train", currency="tokens"}[5m]))',
                        "needed": 'sum(rate(treegrpo_rollout_chain_equivalent_total{@, kind="train", currency="tokens"}[5m])) * (1 - avg(treegrpo_rollout_saving_ratio{@, kind="train", currency="tokens"}))',
                        "chain equivalent": 'sum(rate(treegrpo_rollout_chain_equivalent_total{@, kind="train", currency="tokens"}[5m]))',
                    },
                    "Tokens per second: computed, needed by trees, and needed by chains to the same leaves.",
                ),
                Panel(
                    "Prefix hits by depth",
                    "percentunit",
                    {
                        "depth {{depth}}": 'sum by (depth) (rate(treegrpo_rollout_prefix_tokens_total{@, how="cached"}[5m])) / sum by (depth) (rate(treegrpo_rollout_prefix_tokens_total{@}[5m]))'
                    },
                    "Share of a turn's prefix found in the cache; depth is steps from the root.",
                ),
                Panel(
                    "Computed again",
                    "percentunit",
                    {"{{kind}}": "treegrpo_rollout_recomputed_ratio{@}"},
                    "Share of the spent tokens, mostly because new weights made caches stale.",
                ),
            ],
        ),
        PanelRow(
            "Where expansions went",
            [
                Panel(
                    "Leaves",
                    "short",
                    {
                        "{{kind}} leaves/s": "sum by (kind) (rate(treegrpo_rollout_leaves_total{@}[5m]))",
                        "planned and not made/s": 'sum(rate(treegrpo_rollout_forgone_expansions_total{@, kind="train"}[5m])) or vector(0)',
                    },
                    "Leaves accepted, and planned expansions missing in closed groups.",
                ),
                Panel(
                    "Groups closed",
                    "short",
                    {"{{reason}}": 'sum by (reason) (rate(treegrpo_groups_closed_total{@, kind="train"}[5m]))'},
                    "Per second, by reason; overdue: closed early, at the staleness bound.",
                ),
                Panel(
                    "Lost on the way",
                    "short",
                    {
                        "failed steps/s": "sum(rate(treegrpo_rollout_failed_steps_total{@}[5m])) or vector(0)",
                        "leaves too late/s": "sum(rate(treegrpo_rollout_leaves_dropped_total{@}[5m])) or vector(0)",
                        "groups set aside/s": "sum(rate(treegrpo_groups_set_aside_total{@}[5m])) or vector(0)",
                    },
                    "All 0 when all is well.",
                ),
            ],
        ),
    ],
)
