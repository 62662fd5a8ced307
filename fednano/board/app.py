"""The web application: the page, its assets, the state as JSON, and the reports of runs. Nothing else is served."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fednano.board.load import HostLoad
from fednano.board.observer import Observer

__all__ = ["make_app"]

_ASSETS = {
    "dashboard.css": "text/css",
    "dashboard.js": "text/javascript",
    "charts.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report brings its own styles and pictures. Its texts come from data, so that it is held in a sandbox besides.
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class _Guarded:
    """Adds the headers to every answer, errors too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                extra = {"Content-Security-Policy": _POLICY, **_HEADERS}
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in extra.items() if k.lower().encode() not in given),
                ]
            await send(message)

        await self._app(scope, receive, sending)


def make_app(observer: Observer, load: HostLoad | None = None, *, hosts: list[str] | None = None) -> ASGIApp:
    """The application.

    Args:
        observer: the runs.
        load: a language host to ask for its load.
        hosts: names that a browser may call this server by, so that a page elsewhere cannot reach it under a name of
            its own (DNS rebinding); any by default.

    Returns:
        An ASGI application with ``/``, ``/assets/NAME``, ``/api/state`` and ``/runs/ID/report.html``.
    """

    def page(request: Request) -> Response:
        return Response(_asset("index.html"), media_type="text/html")

    def asset(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _ASSETS:
            return _missing("no such file")
        return Response(_asset(name), media_type=_ASSETS[name])

    def state(request: Request) -> Response:
        query = request.query_params
        version, found = observer.state(query.get("run", ""), known=query.get("version", ""))
        host = load.read() if load else None
        return _json({"version": version, "state": found, "host": host})

    def report(request: Request) -> Response:
        folder = observer.folder(request.path_params["run"])
        path = folder / "report.html" if folder else None
        if path is None or path.is_symlink() or not path.is_file():
            return _missing("this run has no report yet")
        headers = {"Content-Security-Policy": _REPORT_POLICY}
        return Response(path.read_bytes(), media_type="text/html", headers=headers)

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/assets/{name}", asset),
            Route("/api/state", state),
            Route("/runs/{run}/report.html", report),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts or ["*"], www_redirect=False)],
    )
    return _Guarded(app)


@functools.cache
def _asset(name: str) -> bytes:
    return (files("fednano.board") / "assets" / name).read_bytes()


def _json(value: Mapping[str, object]) -> Response:
    return Response(json.dumps(value, allow_nan=False), media_type="application/json")


def _missing(text: str) -> Response:
    return Response(text, status_code=404, media_type="text/plain")
