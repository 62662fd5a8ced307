"""The two Flower apps. Everything they do lies in :mod:`server` and :mod:`client_task`.

Importing this loads no torch: at a site with a warm worker, Flower's processes pass messages on and end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fednano.federation.config import OTHER_WORK, UNPROTECTED, RunConfig

if TYPE_CHECKING:
    from fednano.federation.exchange import Stop
    from fednano.runs import RunView

__all__ = ["client_app", "make_server_app"]

client_app = ClientApp()
"""The client's app: the same object under SuperNodes, in Flower's simulation and in this process."""


def _answer(task: str, message: Message, context: Context) -> Message:
    """Perform a task here, or in the site's warm worker where its node configuration names one."""
    node = dict(context.node_config)
    if worker := str(node.get("worker", "")):
        from fednano.federation.warm import forward

        return Message(forward(worker, task, message.content, node), reply_to=message)
    from fednano.federation.tasks import carry_out

    return Message(carry_out(task, message.content, node), reply_to=message)


@client_app.query("hello")
def _hello(message: Message, context: Context) -> Message:
    return _answer("hello", message, context)


@client_app.query("gather")
def _gather(message: Message, context: Context) -> Message:
    return _answer("gather", message, context)


@client_app.query("install")
def _install(message: Message, context: Context) -> Message:
    return _answer("install", message, context)


@client_app.query("secure")
def _secure(message: Message, context: Context) -> Message:
    return _answer("secure", message, context)


@client_app.query("resurfaced")
def _resurfaced(message: Message, context: Context) -> Message:
    return _answer("resurfaced", message, context)


@client_app.query("unlearn")
def _asked_to_unlearn(message: Message, context: Context) -> Message:
    return _answer("unlearn", message, context)


@client_app.train("unlearn")
def _unlearn(message: Message, context: Context) -> Message:
    return _answer("unlearn", message, context)


@client_app.train()
def _train(message: Message, context: Context) -> Message:
    return _answer("train", message, context)


@client_app.evaluate()
def _evaluate(message: Message, context: Context) -> Message:
    return _answer("evaluate", message, context)


def make_server_app(
    config: RunConfig | None = None,
    *,
    view: RunView | None = None,
    stop: Stop | None = None,
    done: Callable[[Any], None] | None = None,
) -> ServerApp:
    """The server's app.

    Args:
        config: the run's settings; ``None`` reads them from the app's run configuration.
        view: what the user sees; ``None`` chooses from the terminal.
        stop: lets somebody else end the run early.
        done: called with the run folder's path at the end.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from fednano.federation.server import run_server
        from fednano.federation.tasks import OTHER_WORK_BY, loaded

        given = dict(context.run_config)
        run, unprotected = str(given.pop(OTHER_WORK, "")), bool(given.pop(UNPROTECTED, False))
        settings = config or RunConfig.from_mapping(given)
        if run:
            loaded(OTHER_WORK_BY)(grid, run, settings, allow_unprotected=unprotected)
            return
        path = run_server(grid, settings, view=view, stop=stop)
        if done is not None:
            done(path)

    return app
