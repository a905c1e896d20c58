"""What learner and services share. It imports neither of them, and no torch."""
