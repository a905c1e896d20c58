"""The `treegrpo` command. It may import everything, and nothing imports it."""
