"""The command line. Importing it does not import torch."""

from esper.cli.app import app, main

__all__ = ["app", "main"]
