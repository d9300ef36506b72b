"""Measurements: each is a command of its own, and its figures are in docs/measurements.md."""
