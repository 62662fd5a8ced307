"""Adapters by name."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from importlib.metadata import entry_points

from fednano.adapters.method import Method
from fednano.errors import ConfigError, did_you_mean

__all__ = ["create", "names", "options", "register"]

GROUP = "fednano.adapters"
"""Entry points of installed packages that bring adapters of their own: ``NAME = "module:Class"``."""

_REGISTRY: dict[str, type[Method]] = {}
M = typing.TypeVar("M", bound=Method)


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator that makes a method reachable as ``create(name)``."""

    def add(cls: type[M]) -> type[M]:
        if name in _REGISTRY:
            raise ValueError(f"two adapters are called {name!r}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def names() -> list[str]:
    """Names that `create` knows, sorted; those that installed packages bring among them."""
    return sorted({*_REGISTRY, *(point.name for point in entry_points(group=GROUP))})


def options(name: str) -> dict[str, object]:
    """Options of an adapter with their defaults.

    Raises:
        ConfigError: no adapter has that name.
    """
    return {field.name: field.default for field in dataclasses.fields(_find(name))}


def create(name: str, **given: object) -> Method:
    """Return the adapter called ``name`` with the given options.

    Raises:
        ConfigError: unknown name or option (the message lists what exists), wrong type, or a value out of
            range.
    """
    cls = _find(name)
    known = options(name)
    for option in given:
        if option not in known:
            raise ConfigError(
                f"adapter {name!r} has no option {option!r}.{did_you_mean(option, known)} Its options: "
                f"{', '.join(sorted(known))}"
            )
    hints = typing.get_type_hints(cls)
    return cls(**{option: _coerce(name, option, value, hints[option]) for option, value in given.items()})


def _find(name: str) -> type[Method]:
    if name not in _REGISTRY:
        for point in entry_points(group=GROUP, name=name):
            try:
                point.load()  # registers itself
            except (ImportError, AttributeError) as error:
                raise ConfigError(
                    f"adapter {name!r} is announced by an installed package, but {point.value} cannot be had: {error}. "
                    "Install that package anew."
                ) from error
    if name not in _REGISTRY:
        raise ConfigError(
            f"unknown adapter {name!r}.{did_you_mean(name, names())} Adapters: {', '.join(names())}"
        )
    return _REGISTRY[name]


def _coerce(adapter: str, option: str, value: object, hint: object) -> typing.Any:
    """Check ``value`` against a field's annotation; an int is taken where a float is expected."""
    allowed = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for kind in allowed:
        if kind is type(None):
            if value is None:
                return None
        elif typing.get_origin(kind) is typing.Literal:
            if value in typing.get_args(kind):
                return value
        elif typing.get_origin(kind) is tuple:
            if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
                return tuple(value)
        elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif isinstance(kind, type) and type(value) is kind:
            return value
    expected = " or ".join(
        " | ".join(repr(choice) for choice in typing.get_args(kind))
        if typing.get_origin(kind) is typing.Literal
        else getattr(kind, "__name__", str(kind))
        for kind in allowed
    )
    raise ConfigError(
        f"adapter {adapter!r}, option {option!r}: got {value!r} ({type(value).__name__}); expected {expected}"
    )
