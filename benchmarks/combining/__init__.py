"""What `benchmarks/aggregation.py` compares with: peers, networks, ways to measure."""
