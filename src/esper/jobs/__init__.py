"""Built-in training jobs on real data."""
