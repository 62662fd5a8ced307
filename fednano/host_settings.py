"""What a language host is told by whoever starts it: a federation's server, or a run. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fednano.errors import ConfigError, did_you_mean

__all__ = ["HostSettings", "known_keys", "right_kinds"]


@dataclass(frozen=True)
class HostSettings:
    """Options of ``fednano host`` by their names, which its help explains.

    What is ``None`` or empty is left to the host, which knows its device.
    """

    model: str = "tiny"
    device: str = "cpu"
    device_map: str = ""
    dtype: str = "float32"
    weights: str = ""
    workers: int = 2
    threads: int = 1
    batch_tokens: int | None = None
    linger_ms: float | None = None
    compile: bool = False
    cuda_graphs: bool = False
    memory_gb: float | None = None
    keep_bytes: int | None = None
    keep_disk_bytes: int | None = None
    keep_gpu_bytes: int | None = None
    keep_graphs: int | None = None
    max_batch: int | None = None
    max_tokens: int | None = None
    max_new_tokens: int | None = None
    max_requests: int | None = None
    log_format: str = "text"

    def options(self) -> list[str]:
        """All but the model, as words of a command line."""
        words: list[str] = []
        for spec in fields(self):
            value, name = getattr(self, spec.name), f"--{spec.name.replace('_', '-')}"
            if spec.name == "model":
                continue
            if value is True:
                words.append(name)
            elif value is not None and value is not False and value != "":  # a 0 is said
                words += [name, str(value)]
        return words

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str, prefix: str = "") -> HostSettings:
        """Settings by their names with hyphens.

        Args:
            values: as TOML has them.
            where: what holds them, for the message.
            prefix: of their names there.

        Raises:
            ConfigError: an unknown name, or a value of another kind.
        """
        names = [spec.name for spec in fields(cls)]
        return cls(**right_kinds(cls, known_keys(values, names, where, prefix), where))


def known_keys(
    values: Mapping[str, Any], known: Collection[str], where: str, prefix: str = ""
) -> dict[str, Any]:
    """Settings by their names in Python.

    Args:
        values: by names with hyphens.
        known: names with underscores.
        where: what holds them, for the message.
        prefix: of their names there.

    Raises:
        ConfigError: a name is not known; the message has the nearest that is.
    """
    renamed = {key.replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(renamed) - set(known))
    if unknown:
        key, *_ = (each.replace("_", "-") for each in unknown)
        hint = did_you_mean(key, (each.replace("_", "-") for each in known))
        raise ConfigError(f"{where} has the unknown key {prefix}{key}.{hint}")
    return renamed


def right_kinds(kind: type[Any], values: dict[str, Any], where: str) -> dict[str, Any]:
    """The same values, if they are of the kinds that a dataclass's fields have.

    Raises:
        ConfigError: one is not.
    """
    types = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    for spec in fields(kind):
        wanted = types.get(str(spec.type).removesuffix(" | None"))
        # Exactly: True is an int, too.
        if spec.name in values and wanted is not None and type(values[spec.name]) not in wanted:
            expected = wanted[-1].__name__
            raise ConfigError(
                f"{where}: {spec.name.replace('_', '-')} is {values[spec.name]!r}; expected {expected}."
            )
    return values
