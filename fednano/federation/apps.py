"""The two Flower apps. Everything they do lies in :mod:`server` and :mod:`client_task`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fednano.federation.config import RunConfig
from fednano.federation.exchange import Stop
from fednano.federation.messages import Instruction, Reply
from fednano.runs import RunView

__all__ = ["client_app", "make_server_app"]

client_app = ClientApp()
"""The client's app: the same object under SuperNodes, in Flower's simulation and in this process."""


def _answer(
    task: Callable[[Instruction, Mapping[str, Any]], Reply], message: Message, context: Context
) -> Message:
    from fednano.federation.client_task import perform

    instruction = Instruction.from_records(message.content)
    return Message(perform(task, instruction, dict(context.node_config)).to_records(), reply_to=message)


@client_app.query("hello")
def _hello(message: Message, context: Context) -> Message:
    from fednano.federation.client_task import hello

    return _answer(hello, message, context)


@client_app.query("gather")
def _gather(message: Message, context: Context) -> Message:
    from fednano.federation.client_task import gather

    return _answer(gather, message, context)


@client_app.query("install")
def _install(message: Message, context: Context) -> Message:
    from fednano.federation.client_task import install

    return _answer(install, message, context)


@client_app.query("secure")
def _secure(message: Message, context: Context) -> Message:
    from fednano.federation.client_task import secure

    return _answer(secure, message, context)


@client_app.train()
def _train(message: Message, context: Context) -> Message:
    from fednano.federation.client_task import train

    return _answer(train, message, context)


@client_app.evaluate()
def _evaluate(message: Message, context: Context) -> Message:
    from fednano.federation.client_task import evaluate

    return _answer(evaluate, message, context)


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

        settings = config or RunConfig.from_mapping(dict(context.run_config))
        path = run_server(grid, settings, view=view, stop=stop)
        if done is not None:
            done(path)

    return app
