"""Evidence: scores, sweeps, controls and experiments."""
