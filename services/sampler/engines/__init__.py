"""The engine protocol, what engines share, and the engines."""
