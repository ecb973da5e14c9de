"""Models that grow, beside ones of a fixed size."""
