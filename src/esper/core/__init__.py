"""Core: shared foundations. Configuration and its sources, deadlines; no torch."""
