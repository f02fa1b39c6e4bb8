"""What both sides share: configuration, protocol, envelopes, adapters; no torch outside engine."""

# As in pyproject.toml (a test compares them): the app that Flower ships has no metadata.
VERSION = "0.1.0"
