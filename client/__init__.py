"""A hospital: SuperNode, byte pipe, trainer, policy."""
