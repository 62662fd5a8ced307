"""The Flower ServerApp: entry point only. What it does lies in `fednano.federation`."""

from fednano.federation.apps import make_server_app

app = make_server_app()
