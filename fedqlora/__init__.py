"""What both sides share: configuration, protocol, envelopes, adapters; no torch outside engine."""
