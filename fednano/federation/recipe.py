"""Settings as people write them: a line of ``key=value``, or a TOML file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from fednano.errors import ConfigError

__all__ = ["parse_settings", "read_recipe"]

_WORDS = re.compile(
    r"""[^\s"']+(?:"(?:[^"\\]|\\.)*"|'[^']*'|[^\s"'])*|\S+"""
)  # a quoted value may hold spaces


def parse_settings(text: str, where: str) -> dict[str, Any]:
    """``'rounds=3 rule="fisher"'`` as TOML values, the way `flwr run --run-config` writes them.

    Args:
        text: settings, separated by spaces.
        where: what the text is, for the error message.

    Raises:
        ConfigError: the text is not a list of settings.
    """
    settings: dict[str, Any] = {}
    for word in _WORDS.findall(text):
        try:
            settings |= tomllib.loads(word)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(
                f"{where} has {word!r}; expected settings such as 'rounds=3 rule=\"fisher\"' ({error})."
            ) from error
    return settings


def read_recipe(file: Path) -> dict[str, Any]:
    """The settings in a TOML file: in the table ``tool.flwr.app.config`` of a Flower app, else at its top.

    Raises:
        ConfigError: there is no such file, or it is no TOML.
    """
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"the settings file {file} cannot be read: {error.strerror}. Check the path."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the settings file {file} is not TOML: {error}.") from error
    table: Any = found
    for key in ("tool", "flwr", "app", "config"):
        if not isinstance(table, dict) or key not in table:
            table = None if "tool" in found else found
            break
        table = table[key]
    if not isinstance(table, dict):
        raise ConfigError(f"{file} has no table [tool.flwr.app.config]. Write the settings there.")
    return table
