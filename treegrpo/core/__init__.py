"""The vocabulary of both sides: step, subtree, tree, lease, budget, question."""
