"""TLS credentials, roles, and certificates that are reloaded."""
