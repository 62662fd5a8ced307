"""Keeping what a single client contributes private."""
