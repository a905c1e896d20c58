"""The write-ahead log: frames with checksums, in segments, on a file system that tests can crash."""
