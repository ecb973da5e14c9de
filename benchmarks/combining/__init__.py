"""What `benchmarks/aggregation.py` compares: other ways to combine gradients, networks, measures."""
