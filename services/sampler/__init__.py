"""The sampler: leases, expansion of trees, and the stream of subtrees to the learner."""
