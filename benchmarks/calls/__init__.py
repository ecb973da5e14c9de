"""What the benchmark of calls has called."""
