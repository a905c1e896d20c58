"""The ranks of a trainer of several processes, and what launches them."""
