"""Command-line options made from the run settings, so that no setting can be missing or drift from its help text."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fednano.federation.config import RunConfig
from fednano.federation.recipe import read_recipe

__all__ = ["settings_options"]

_TYPES = {"bool": bool, "int": int, "float": float, "str": str}


_RECIPE = "recipe_file"
_SHORT = {"dataset": "--data"}


def _names(setting: str) -> list[str]:
    """The option of a setting, and its short form where it has one."""
    return [f"--{setting.replace('_', '-')}", *([_SHORT[setting]] if setting in _SHORT else [])]


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each run setting, and ``--config`` for a file of them.

    The command's last parameter must be ``settings``; it receives only the settings that the user gave, by option or
    else in the file.
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
                    *_names(spec.name),
                    help=f"{spec.metadata['help']} [default: {spec.default!r}]",
                    rich_help_panel="Run settings",
                ),
            ],
        )
        for spec in specs
    ]
    options.append(
        inspect.Parameter(
            _RECIPE,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option("--config", help="TOML file with settings, such as an app's pyproject.toml."),
            ],
        )
    )
    names = {spec.name for spec in specs}

    def wrapper(**values: Any) -> None:
        settings = {name: values.pop(name) for name in names & set(values)}
        file = values.pop(_RECIPE, None)
        found = (
            {} if file is None else {key.replace("-", "_"): value for key, value in read_recipe(file).items()}
        )
        given = {name: value for name, value in settings.items() if value is not None}
        command(**values, settings=found | given)

    wrapper.__doc__ = command.__doc__
    wrapper.__name__ = command.__name__
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    wrapper.__signature__ = inspect.Signature([*keyword, *options])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*keyword, *options]}
    return wrapper
