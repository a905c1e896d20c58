"""The configuration: sections, their sources, and the fingerprint of a run."""
