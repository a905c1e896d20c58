"""Metrics, `progress.jsonl`, and the diagnosis of a run that stalls."""
