"""Checks of configuration, model, data and machine before a run starts."""
