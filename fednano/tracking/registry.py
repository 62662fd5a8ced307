"""From ``--track`` to trackers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fednano.errors import ConfigError
from fednano.tracking.protocol import Tracker

__all__ = ["NAMES", "check_names", "make_trackers"]

NAMES = ("tensorboard", "mlflow", "wandb", "prometheus")
_METHODS = ("start", "log", "finish")


def _split(text: str) -> list[tuple[str, str]]:
    """``"tensorboard,prometheus=127.0.0.1:9465"`` as names with what follows them."""
    found = []
    for part in (each.strip() for each in text.split(",")):
        if part:
            name, _, more = part.partition("=")
            found.append((name, more))
    return found


def check_names(text: str) -> None:
    """Raise ConfigError unless ``text`` is what ``--track`` takes; imports nothing."""
    seen = set()
    for name, more in _split(text):
        module, colon, attribute = name.partition(":")
        own = bool(colon) and all(part.isidentifier() for part in (*module.split("."), attribute))
        if name not in NAMES and not own:
            raise ConfigError(
                f"track is {text!r}; expected {', '.join(NAMES)}, or a class of your own as package.module:Class."
            )
        if more and name != "prometheus":
            raise ConfigError(
                f"track has {name}={more}; {name} takes nothing. Configure it by its own environment."
            )
        if name in seen:
            raise ConfigError(f"track names {name} twice. Name each once.")
        seen.add(name)


def make_trackers(text: str) -> list[tuple[str, Tracker]]:
    """The trackers that ``--track`` names, not yet started, with their names.

    Raises:
        ConfigError: unknown name, the package is not installed, or one's own class cannot be had.
    """
    check_names(text)
    return [(name, _make(name, more)) for name, more in _split(text)]


def _make(name: str, more: str) -> Tracker:
    if ":" in name:
        return _own(name)
    module = importlib.import_module(f"fednano.tracking.{name}")
    maker: Callable[..., Tracker] = module.make
    try:
        return maker(more) if more else maker()
    except ImportError as error:
        raise ConfigError(
            f"track names {name}, which is not installed ({error}). Install it: pip install 'fednano[{name}]'"
        ) from error


def _own(name: str) -> Tracker:
    module, _, attribute = name.partition(":")
    # A console command does not look where it is started; Python and uvicorn do.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        made: Any = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"track names {name}, which cannot be had: {error}. Write package.module:Class, importable from here."
        ) from error
    except TypeError as error:
        raise ConfigError(f"track names {name}, which cannot be made without arguments: {error}.") from error
    if missing := [method for method in _METHODS if not callable(getattr(made, method, None))]:
        raise ConfigError(
            f"track names {name}, which has no {', '.join(missing)}. It must be a fednano.tracking.Tracker."
        )
    tracker: Tracker = made
    return tracker
