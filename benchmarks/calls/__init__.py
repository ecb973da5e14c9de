"""Calls under deadlines in various ways, and what the benchmark of them measures."""
