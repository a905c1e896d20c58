"""Files: model directories, manifests, rows, locks, temporary directories."""
