"""Evidence: scores with intervals, sweeps, evaluations with controls, and experiments."""
