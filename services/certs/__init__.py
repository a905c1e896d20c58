"""The certificate authority of a run, and the certificates that it issues."""
