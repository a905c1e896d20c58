"""Coordinates a run: grants leases, accepts subtrees, closes groups, hands batches to the trainer, announces versions."""
