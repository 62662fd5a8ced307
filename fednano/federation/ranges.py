"""Which values a run's settings may have, each by itself and together."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from fednano.data.options import DataOptions
from fednano.errors import ConfigError
from fednano.federation.faults import parse_faults
from fednano.federation.recipe import parse_settings
from fednano.host_settings import HostSettings
from fednano.tracking.registry import check_names

if TYPE_CHECKING:
    from fednano.federation.config import RunConfig

__all__ = ["check_together", "check_values", "hyphenated"]

_AT_LEAST = {
    "clients": 1,
    "rank": 1,
    "rounds": 1,
    "samples": 1,
    "batch_size": 1,
    "fisher_samples": 1,
    "min_replies": 1,
    "host_workers": 1,
    "threads": 1,
    "evaluate_every": 0,
    "gather_samples": 1,
    "host_batch_tokens": 0,
    "evaluate_samples": 0,
    "final_samples": 0,
    "evaluate_clients_every": 0,
    "early_stop": 0,
    "max_new_tokens": 0,
    "seed": 0,
}
_POSITIVE = (
    *("alpha", "learning_rate", "max_abs", "round_timeout", "join_timeout", "host_retry"),
    *("dp_clip", "dp_noise", "dp_delta"),
)
_NON_NEGATIVE = (
    "weight_decay",
    "proximal_mu",
    "clip_norm",
    "over_select",
    "staleness",
    "max_norm",
    "dp_epsilon",
    "rejoin_timeout",
    "guard_forgotten",
)
_CHOICES = {
    "partition": ("dirichlet", "iid", "column", "folders", "linear", "square", "exponential"),
    "metric": (*("auto", "exact-match", "vqa", "choice", "token-f1", "macro-f1", "rouge-l", "entity-f1"),),
    "data_kind": (
        *("auto", "vqa", "multiple-choice", "instruction"),
        *("text-classification", "token-classification", "image-classification"),
    ),
    "activation": ("linear", "gelu"),
    "optimizer": ("adam", "adamw", "sgd"),
    "late": ("drop", "buffer"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "keep": ("last", "best"),
    "codec": ("fp32", "bf16", "fp16", "int8", "int4", "sign", "topk", "dct"),
    "dp": ("off", "client", "sample"),
    "placement": ("split", "local"),
    "exchange": ("full", "factored", "label-private"),
    "wire_dtype": ("float32", "bfloat16", "float16", "int8"),
}


def hyphenated(name: str) -> str:
    """A setting's name outside of Python."""
    return name.replace("_", "-")


def check_values(config: RunConfig) -> None:
    """Check the type and range of each setting.

    Raises:
        ConfigError: a value is out of its range; the message names the setting, the value and what is expected.
    """
    for spec in dataclasses.fields(config):
        _check_type(spec, getattr(config, spec.name))
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value < least:
            raise ConfigError(f"{hyphenated(name)} is {value}; expected at least {least}.")
    for name in _POSITIVE:
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{hyphenated(name)} is {value}; expected a positive number.")
    for name in _NON_NEGATIVE:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{hyphenated(name)} is {value}; expected 0 or a positive number.")
    for name, allowed in _CHOICES.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ConfigError(f"{hyphenated(name)} is {value!r}; expected one of {', '.join(allowed)}.")
    _check_shares(config)


def check_together(config: RunConfig) -> None:
    """Check what settings written as text say, and which of them go together.

    Raises:
        ConfigError: a text cannot be read, or two settings exclude each other.
    """
    if config.exchange == "factored" and config.wire_dtype == "float16":
        raise ConfigError(
            "the factored exchange does not travel as float16; set wire-dtype to bfloat16 or int8."
        )
    _check_schedules(config)
    for name in ("adapter_options", "rule_options", "codec_options"):
        parse_settings(getattr(config, name), hyphenated(name))
    _check_host(config)
    _check_data(config)
    check_names(config.track)
    parse_faults(config.faults)
    names = config.stream_names
    if not names or any(name not in ("image", "text") for name in names) or len(set(names)) != len(names):
        raise ConfigError(f"streams is {config.streams!r}; expected 'image', 'text' or 'image,text'.")


def _check_shares(config: RunConfig) -> None:
    if not 0 < config.fraction <= 1:
        raise ConfigError(f"fraction is {config.fraction}; expected a number above 0 and at most 1.")
    if not 0 <= config.holdout < 1:
        raise ConfigError(f"holdout is {config.holdout}; expected a number from 0 to below 1.")
    if not 0.5 < config.secure_threshold <= 1:
        raise ConfigError(
            f"secure-threshold is {config.secure_threshold}; expected a number above 0.5 and at most 1."
        )
    if not config.dp_delta < 1:
        raise ConfigError(f"dp-delta is {config.dp_delta}; expected a number below 1, such as 1e-05.")
    if not 0 < config.lr_final <= 1:
        raise ConfigError(f"lr-final is {config.lr_final}; expected a number above 0 and at most 1.")


def _check_host(config: RunConfig) -> None:
    options = parse_settings(config.host_options, "host-options")
    HostSettings.from_mapping(options, "host-options")
    if "model" in options:
        raise ConfigError(
            "host-options has a model; leave it out: the host serves the run's own, the setting model."
        )
    if options and (config.host_address or config.server_dir or config.placement == "local"):
        other = "placement" if config.placement == "local" else "host-address or server-dir"
        raise ConfigError(
            f"host-options are for a host that the run starts itself, and {other} says that it starts none; give them "
            "to that host, or leave them out."
        )


def _check_data(config: RunConfig) -> None:
    DataOptions.from_mapping(parse_settings(config.data_options, "data-options"))
    if config.partition == "column" and not config.partition_by:
        raise ConfigError(
            "partition is 'column', and partition-by names none. Set it to a column, such as 'hospital'."
        )
    if config.partition_by and config.partition not in ("column", "dirichlet"):
        raise ConfigError(
            f"partition-by is {config.partition_by!r}, which partition {config.partition!r} does not use. Set "
            "partition to 'column' or 'dirichlet', or leave partition-by out."
        )


def _check_schedules(config: RunConfig) -> None:
    if any(not 1 <= rank <= config.rank for rank in config.own_ranks):
        raise ConfigError(
            f"client-ranks is {config.client_ranks!r}; expected ranks from 1 to rank, which is {config.rank}. Give the "
            "server the largest rank of all clients."
        )
    if config.own_ranks and (config.rank_steps or config.late == "buffer"):
        raise ConfigError(
            "client-ranks goes neither with rank-schedule nor with late 'buffer': an update of another rank or "
            "round could not be told from a wrong one. Leave one of them out."
        )
    if config.evaluate_clients_every and not config.holdout:
        raise ConfigError("evaluate-clients-every needs samples that clients hold out; holdout is 0.")
    if (config.early_stop or config.keep == "best") and not (
        config.evaluate_every or config.evaluate_clients_every
    ):
        raise ConfigError(
            "early-stop and keep 'best' go by evaluations between rounds, and there are none. Set "
            "evaluate-clients-every or evaluate-every."
        )
    if any(rank < 1 or start < 1 for start, rank in config.rank_steps):
        raise ConfigError(f"rank-schedule is {config.rank_schedule!r}; expected rounds and ranks from 1.")


def _check_type(spec: dataclasses.Field[Any], value: Any) -> None:
    expected = {"bool": bool, "int": int, "float": float, "str": str}[str(spec.type)]
    if type(value) is not expected:
        raise ConfigError(
            f"{hyphenated(spec.name)} is {value!r} ({type(value).__name__}); expected {expected.__name__}, "
            f"for example {spec.default!r}."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{hyphenated(spec.name)} is {value}; expected a finite number.")
