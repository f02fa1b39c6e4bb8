"""What an aggregator could learn of a site's records, tried on this system: docs/attacks.md."""
