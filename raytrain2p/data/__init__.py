"""Records and their checks, the feature store, token records and batches."""
