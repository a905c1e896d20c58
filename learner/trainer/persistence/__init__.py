"""Checkpoints and published policy versions."""
