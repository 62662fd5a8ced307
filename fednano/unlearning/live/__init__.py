"""Unlearning through live SuperNodes: the same job as on a finished simulation, with every sample left at its site."""
