"""Credit assignment, advantages, corrections and losses: formulas without a model, a disk or a network."""
