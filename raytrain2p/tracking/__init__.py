"""Where a run is kept: its identity, its directory, MLflow, checkpoints and images. MLflow is imported here alone."""
