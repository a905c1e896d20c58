"""The embedded MQTT broker, for runs on one machine."""
