"""Persistent state of the intake: lease events, snapshots, compaction, recovery, and the lock of a run."""
