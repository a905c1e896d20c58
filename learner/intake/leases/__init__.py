"""The rules of leases, groups, questions, budget and staleness: no clock, no disk, no network."""
