"""The run's language host: the operator's own, or one that this process starts and ends."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fednano.errors import ConfigError, HostError
from fednano.federation.config import RunConfig
from fednano.federation.enrolled import own_ticket, place_of
from fednano.federation.messages import HostTicket
from fednano.federation.model import connect
from fednano.federation.recipe import parse_settings
from fednano.host import HostProcess, RemoteLLM, host_command, new_token
from fednano.host_settings import HostSettings
from fednano.runs import RunView

__all__ = ["open_host"]


@contextmanager
def open_host(config: RunConfig, view: RunView, log: Path, run: str) -> Iterator[HostTicket]:
    """Give the run its language host, for as long as the block lasts.

    Args:
        config: the run's settings; with ``server_dir`` or ``host_address`` the operator's host is used, else one is
            started here, on the loopback interface, with a token that only this run's clients learn.
        view: told where the host is.
        log: file for what the started host writes.
        run: id of the run.

    Raises:
        HostError: the host does not start, or does not answer.
    """
    if config.placement == "local":
        yield HostTicket()
        return
    place = place_of(config.to_mapping())
    if place is not None or config.host_address:
        ticket = own_ticket(place, run) if place else _outside_ticket(config)
        with connect(config, ticket, place.credentials if place else None) as llm:
            assert isinstance(llm, RemoteLLM)
            fingerprint = llm.describe().fingerprint
        view.message(f"language host: {ticket.address}")
        yield replace(ticket, fingerprint=fingerprint)
        return
    token = new_token()
    command = host_command(config.model, *settings_of(config).options())
    with HostProcess(command, tokens=[token], log=log) as host:
        view.message(
            f"language host: {host.address}, plain text on the loopback interface, this run's token only"
        )
        yield HostTicket(host.address, token=token, fingerprint=host.fingerprint)
        if not host.running:
            raise HostError(f"the language host ended by itself. Its log is {log}.")


def settings_of(config: RunConfig) -> HostSettings:
    """What the host is told that a run starts.

    Raises:
        ConfigError: ``host-options`` has an unknown name, or a value of another kind.
    """
    own = {
        "workers": config.host_workers,
        "threads": config.threads,
        "batch-tokens": config.host_batch_tokens,
        "device": config.device,
    }
    return HostSettings.from_mapping(
        own | parse_settings(config.host_options, "host-options"), "host-options"
    )


def _outside_ticket(config: RunConfig) -> HostTicket:
    """What clients need to reach a host that an operator runs."""
    token = _read(config.host_token_file, "host-token-file").strip()
    root = _read(config.host_ca, "host-ca")
    try:
        raw = base64.urlsafe_b64decode(token)
    except ValueError as error:
        raise ConfigError(
            f"host-token-file {config.host_token_file!r} does not hold base64url text."
        ) from error
    return HostTicket(config.host_address, token=raw, root_certificates=root)


def _read(path: str, setting: str) -> bytes:
    if not path:
        return b""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting} is {path!r}, which cannot be read: {error.strerror}.") from error
