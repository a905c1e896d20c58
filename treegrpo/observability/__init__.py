"""Logging, metrics, and the server for /metrics and /health."""
