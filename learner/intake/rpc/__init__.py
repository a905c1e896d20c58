"""The gRPC server for samplers and the socket for the trainer, with authentication and request limits."""
