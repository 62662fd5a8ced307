"""The language host: a gRPC service that holds the frozen language model, and the client that stands for it."""

from __future__ import annotations

from fednano.host.client import RemoteLLM
from fednano.host.limits import HostInfo, HostLimits
from fednano.host.process import HostProcess, host_command
from fednano.host.security import (
    Claims,
    HostSecurity,
    RunTokens,
    StaticTokens,
    TokenRefusedError,
    TokenVerifier,
    new_token,
)
from fednano.host.server import HostServer, RunningHost, serve
from fednano.host.wire import Wire, WireCount

__all__ = [
    "Claims",
    "HostInfo",
    "HostLimits",
    "HostProcess",
    "HostSecurity",
    "HostServer",
    "RemoteLLM",
    "RunTokens",
    "RunningHost",
    "StaticTokens",
    "TokenRefusedError",
    "TokenVerifier",
    "Wire",
    "WireCount",
    "host_command",
    "new_token",
    "serve",
]
