"""Where a run is kept: its identity, its directory, MLflow, checkpoints and pictures. MLflow is imported here alone."""
