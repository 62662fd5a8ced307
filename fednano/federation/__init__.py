"""Federated runs on Flower: settings, round loop, client tasks. The only part of the library that imports flwr.

Importing this package is cheap; Flower and torch are loaded when a run starts.
"""

from fednano.federation.config import RunConfig

__all__ = ["RunConfig"]
