"""Constrained decoding, baselines and metrics."""
