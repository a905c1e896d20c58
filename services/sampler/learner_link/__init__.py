"""The sampler's connection to the learner: subtree stream, outbox, weight updates."""
