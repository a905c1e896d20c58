"""What a user sees of a run: live view, alerts, summary, plot."""
