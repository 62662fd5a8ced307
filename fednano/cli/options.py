"""Command-line options made from the run settings, so that no setting can be missing or drift from its help text."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fednano.federation.config import RunConfig

__all__ = ["settings_options"]

_TYPES = {"bool": bool, "int": int, "float": float, "str": str}


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each run setting.

    The command's last parameter must be ``settings``; it receives only the settings that the user gave.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
    specs = dataclasses.fields(RunConfig)
    options = [
        inspect.Parameter(
            spec.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                _TYPES[str(spec.type)] | None,
                typer.Option(
                    f"--{spec.name.replace('_', '-')}",
                    help=f"{spec.metadata['help']} [default: {spec.default!r}]",
                    rich_help_panel="Run settings",
                ),
            ],
        )
        for spec in specs
    ]
    names = {spec.name for spec in specs}

    def wrapper(**values: Any) -> None:
        settings = {name: values.pop(name) for name in names & set(values)}
        command(**values, settings={name: value for name, value in settings.items() if value is not None})

    wrapper.__doc__ = command.__doc__
    wrapper.__name__ = command.__name__
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    wrapper.__signature__ = inspect.Signature([*keyword, *options])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*keyword, *options]}
    return wrapper
