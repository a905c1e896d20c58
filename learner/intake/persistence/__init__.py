"""What survives a restart: lease events, snapshots, compaction, recovery, and the lock of a run."""
