"""Trees as packs, in which each distinct token is computed once, and the model that attends along their paths."""
