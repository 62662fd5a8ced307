"""What every call of the host has in common: its token, its messages, its time limits, and how it goes wrong.

Whatever goes wrong in one call ends that call with a status and a trailing ``fednano-reason``; no other call
notices.

=====================  ====================  =========================================================
status                 reason                when
=====================  ====================  =========================================================
INVALID_ARGUMENT       ``invalid``           shape, dtype, limits, ids, non-finite numbers, framing
FAILED_PRECONDITION    ``model``             the client expects another model
FAILED_PRECONDITION    ``missing``           samples of a factored step are not kept (any more)
UNAUTHENTICATED        ``auth``              the token is missing or refused
RESOURCE_EXHAUSTED     ``busy``              no place, or out of memory: try again later
DEADLINE_EXCEEDED      ``idle``              the client stopped sending
INTERNAL               ``internal``          a fault of the host, written to its log
=====================  ====================  =========================================================
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, TypeAlias

import grpc
import torch

from fednano.errors import ConfigError, HostRefused
from fednano.host import codec
from fednano.host.limits import HostLimits
from fednano.host.logs import event
from fednano.host.names import MISSING_KEY, REASON_KEY
from fednano.host.pool import BusyError, ComputePool
from fednano.host.quota import Quotas
from fednano.host.security import Claims, TokenRefusedError, TokenVerifier, parse_bearer
from fednano.host.stats import Stats

__all__ = ["Calls", "Context", "OtherModelError", "SamplesNotKeptError", "Trace"]

log = logging.getLogger(__name__)

_LEAVE_SECONDS = 0.05
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class Calls:
    """Receives, sends and ends calls.

    Args:
        limits: bounds on one request.
        stats: where to count.
        verifier: checks tokens; ``None`` admits everybody.
        pool: has the threads that take coded chunks apart.
        locked: whether a GPU reads what is received.
    """

    def __init__(
        self,
        limits: HostLimits,
        stats: Stats,
        verifier: TokenVerifier | None,
        pool: ComputePool,
        *,
        locked: bool = False,
    ) -> None:
        self._limits, self._stats, self._verifier, self._locked = limits, stats, verifier, locked
        self._pool, self._quotas = pool, Quotas()

    async def _header(self, context: Context, trace: Trace) -> Any:
        message = await self._next(context, trace.call)
        if message is None or message.WhichOneof("frame") != "header":
            raise HostRefused(f"{trace.call}: got no header, expected it as the first message")
        trace.request = message.header.request_id[:64]
        return message.header

    async def _receive(self, context: Context, call: str, nbytes: int) -> codec.Assembler:
        """Collect ``nbytes`` of chunks. Who sends them by drops is not waited for, as if nothing came."""
        buffer = codec.Assembler(nbytes, call, locked=self._locked)
        loop = asyncio.get_running_loop()
        end = loop.time() + self._limits.idle_seconds + nbytes / self._limits.slowest_bytes
        while not buffer.complete:
            if loop.time() > end:
                raise TimeoutError
            message = await self._next(context, call)
            if message is None:
                # The stream of a caller that left ends first; that it was cancelled is known a moment later.
                await asyncio.sleep(_LEAVE_SECONDS)
                buffer.take(0)  # says how many bytes are missing
            elif (frame := message.WhichOneof("frame")) == "chunk":
                buffer.add(message.chunk)
            elif frame == "coded":
                await self._pool.carry(partial(buffer.add_coded, message.coded))
            else:
                raise HostRefused(f"{call}: got a second header, expected chunks")
        return buffer

    async def _next(self, context: Context, call: str) -> Any:
        async with asyncio.timeout(self._limits.idle_seconds):
            message = await context.read()
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]
            return None
        self._stats.add(f"{call}_received_bytes", message.ByteSize())
        return message

    async def _send(self, context: Context, call: str, message: Any) -> None:
        async with asyncio.timeout(self._limits.idle_seconds):
            await context.write(message)
        self._stats.add(
            f"{call}_sent_bytes", len(message) if isinstance(message, bytes) else message.ByteSize()
        )

    @asynccontextmanager
    async def _call(self, context: Context, call: str) -> AsyncIterator[Trace]:
        """Check the token, and turn whatever goes wrong into a status."""
        self._stats.add(f"{call}_requests")
        trace, status = Trace(call, context.peer()), grpc.StatusCode
        try:
            if self._verifier is not None:
                metadata = dict(context.invocation_metadata() or ())
                token = parse_bearer(metadata.get("authorization"))
                trace.claims = self._verifier.verify(
                    token, method=call, peer=context.peer(), certificate=_certificate(context)
                )
            with self._quotas.call(trace.bearer, trace.claims.allowance):
                yield trace
        except asyncio.CancelledError:
            self._stats.add("cancelled")
            raise
        except TokenRefusedError as error:
            await self._abort(context, trace, status.UNAUTHENTICATED, "auth", str(error))
        except SamplesNotKeptError as error:
            missing = ",".join(map(str, error.indexes))
            await self._abort(
                context, trace, status.FAILED_PRECONDITION, "missing", str(error), ((MISSING_KEY, missing),)
            )
        except OtherModelError as error:
            await self._abort(context, trace, status.FAILED_PRECONDITION, "model", str(error))
        except (HostRefused, ConfigError) as error:
            await self._abort(context, trace, status.INVALID_ARGUMENT, "invalid", str(error))
        except (BusyError, MemoryError, torch.OutOfMemoryError) as error:
            await self._abort(
                context, trace, status.RESOURCE_EXHAUSTED, "busy", str(error) or "out of memory"
            )
        except TimeoutError:
            text = (
                f"the client neither sent nor took anything for {self._limits.idle_seconds:g} s, or sent slower than "
                f"{self._limits.slowest_bytes} bytes a second"
            )
            await self._abort(context, trace, status.DEADLINE_EXCEEDED, "idle", text)
        except Exception:
            log.exception("%s failed", trace)
            await self._abort(context, trace, status.INTERNAL, "internal", "the host failed; see its log")

    async def _abort(
        self,
        context: Context,
        trace: Trace,
        code: grpc.StatusCode,
        reason: str,
        text: str,
        more: tuple[tuple[str, str], ...] = (),
    ) -> NoReturn:
        self._stats.add(f"refused_{reason}")
        event("request refused", trace.fields() | {"reason": reason}, usual=False)
        log.debug("%s refused (%s): %s", trace, reason, text)
        await context.abort(code, text, ((REASON_KEY, reason), *more))
        raise AssertionError("unreachable")


@dataclass
class Trace:
    """Names one call in the log."""

    call: str
    peer: str
    claims: Claims = field(default_factory=Claims)
    request: str = ""
    began: float = field(default_factory=time.monotonic)

    @property
    def bearer(self) -> str:
        """Whom the call is counted for."""
        return self.claims.bearer

    def fields(self) -> dict[str, object]:
        """For `fednano.host.logs.event`."""
        spent = round(1000 * (time.monotonic() - self.began))
        return {
            "call": self.call,
            "request": self.request,
            "client": self.bearer or self.peer,
            "peer": self.peer,
            "ms": spent,
        }

    def __str__(self) -> str:
        return f"{self.call} {self.request!r} of {self.peer}"


def _certificate(context: Context) -> bytes | None:
    """What the caller has shown, on a channel that asked for it."""
    return next(iter(context.auth_context().get("x509_pem_cert") or ()), None)


class OtherModelError(HostRefused):
    """The client expects another model."""


class SamplesNotKeptError(HostRefused):
    """Samples of a factored step are not kept (any more)."""

    def __init__(self, indexes: list[int]) -> None:
        super().__init__(f"samples {indexes} of this step are not kept; send them again")
        self.indexes = indexes
