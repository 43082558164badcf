"""Many runs: models by targets by presets, one process each, on one machine or a cluster."""
