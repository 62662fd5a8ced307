"""Unlearning through live SuperNodes: the same job as on a finished simulation, with every sample left at its site."""

PREFIX = "unlearning: "
"""What the app's words about a queue begin with, among a run's events."""

ENDED = f"{PREFIX}ended"
"""The last of them."""

ENDED_EARLY = f"{ENDED} early: "
"""Or this, with the reason behind it."""
