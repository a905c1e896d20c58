"""Messages between processes: codec, MQTT control plane, the trainer's protocol, size limits."""
