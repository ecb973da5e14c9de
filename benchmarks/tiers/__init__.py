"""What the benchmark of the two rollback tiers measures, one module for each table."""
