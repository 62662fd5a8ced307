"""The Flower ClientApp: entry point only. What it does lies in `fednano.federation`."""

from fednano.federation.apps import client_app as app

__all__ = ["app"]
