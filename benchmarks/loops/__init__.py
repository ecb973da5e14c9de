"""The same training loop under every trainer: one file for each."""
