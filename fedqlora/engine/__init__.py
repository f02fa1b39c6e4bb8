"""Engine: models, data and training on one machine; the only importers of torch and its kin."""
