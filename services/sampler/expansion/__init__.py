"""Grows the trees of a lease: branches, episodes, budget, retries, availability of engine and tools."""
