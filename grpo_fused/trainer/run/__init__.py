"""Everything around the algorithm: configuration, data, checkpoints, logs and the command."""
