"""Clock, back-off, and a notifier."""
