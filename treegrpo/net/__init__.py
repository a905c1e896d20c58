"""Addresses, the HTTP client, and network limits."""
