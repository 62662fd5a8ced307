"""The gRPC service: receives requests, checks them, has them computed, and answers in chunks.

Whatever goes wrong in one call ends that call with a status and a trailing ``fednano-reason``; no other call
notices.

=====================  ====================  =========================================================
status                 reason                when
=====================  ====================  =========================================================
INVALID_ARGUMENT       ``invalid``           shape, dtype, limits, ids, non-finite numbers, framing
FAILED_PRECONDITION    ``model``             the client expects another model
UNAUTHENTICATED        ``auth``              the token is missing or refused
RESOURCE_EXHAUSTED     ``busy``              no place, or out of memory: try again later
DEADLINE_EXCEEDED      ``idle``              the client stopped sending
INTERNAL               ``internal``          a fault of the host, written to its log
=====================  ====================  =========================================================
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

import grpc
import torch

from fednano import __version__
from fednano.errors import ConfigError, HostRefused
from fednano.host import codec
from fednano.host.batching import StepBatcher
from fednano.host.compute import begin_generation
from fednano.host.limits import HostLimits
from fednano.host.names import CHUNK_BYTES, LABEL_BYTES, REASON_KEY
from fednano.host.pool import BusyError, ComputePool
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.proto import language_host_pb2_grpc as pb_grpc
from fednano.host.security import TokenRefusedError, TokenVerifier, parse_bearer
from fednano.host.stats import Stats
from fednano.models.language import LocalLLM

__all__ = ["LanguageHost"]

log = logging.getLogger(__name__)

_LEAVE_SECONDS = 0.05
_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class LanguageHost(pb_grpc.LanguageHostServicer):
    """The service over one `LocalLLM`.

    Args:
        llm: the model.
        pool: where to compute.
        limits: bounds on one request.
        stats: where to count.
        verifier: checks tokens; ``None`` admits everybody.
        chunk_bytes: size of the chunks of a reply.
        batch_tokens: see `fednano.host.batching.StepBatcher`.
    """

    def __init__(
        self,
        llm: LocalLLM,
        pool: ComputePool,
        limits: HostLimits,
        stats: Stats,
        *,
        verifier: TokenVerifier | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        batch_tokens: int = 0,
    ) -> None:
        self._steps = StepBatcher(llm, pool, stats, batch_tokens=batch_tokens)
        self._llm, self._pool, self._limits, self._stats = llm, pool, limits, stats
        self._verifier, self._chunk_bytes = verifier, chunk_bytes

    async def Describe(self, request: pb.DescribeRequest, context: _Context) -> pb.DescribeReply:  # noqa: N802
        """What the host serves and what it accepts."""
        from fednano.training.objectives import objective_names

        async with self._call(context, "describe"):
            part, limits = self._llm.part, self._limits
            return pb.DescribeReply(
                fingerprint=part.fingerprint,
                hidden_size=part.hidden_size,
                vocab_size=part.vocab_size,
                max_positions=part.max_positions,
                dtype=str(self._llm.dtype).removeprefix("torch."),
                eos_token_ids=part.eos_token_ids,
                pad_token_id=part.pad_token_id,
                objectives=objective_names(),
                limits=pb.Limits(
                    max_batch=limits.max_batch,
                    max_tokens=limits.max_tokens,
                    max_new_tokens=limits.max_new_tokens,
                    max_request_bytes=limits.max_request_bytes,
                ),
                version=__version__,
            )
        raise AssertionError("unreachable")

    async def Stats(self, request: pb.StatsRequest, context: _Context) -> pb.StatsReply:  # noqa: N802
        """Counters since the host started."""
        async with self._call(context, "stats"):
            return pb.StatsReply(counters=self._stats.snapshot())
        raise AssertionError("unreachable")

    async def Step(self, request: Any, context: _Context) -> None:  # noqa: N802
        """One training step."""
        async with self._call(context, "step") as trace:
            header = await self._header(context, trace)
            body = self._sizes(header, per_token=LABEL_BYTES)
            async with self._pool.admit(body):
                buffer = await self._receive(context, "step", body)
                reply, gradient = await self._steps.run(header, buffer, trace.peer)
                await self._send(context, "step", pb.StepReply(header=reply))
                for chunk in codec.chunks([gradient], self._chunk_bytes):
                    await self._send(context, "step", pb.StepReply(chunk=chunk))
            self._count(trace, header)

    async def Generate(self, request: Any, context: _Context) -> None:  # noqa: N802
        """Greedy answers, one reply per token."""
        async with self._call(context, "generate") as trace:
            header = await self._header(context, trace)
            body = self._sizes(header, new_tokens=header.max_new_tokens)
            packed = header.embeds
            async with self._pool.admit(body):
                buffer = await self._receive(context, "generate", body)
                state = await self._pool.run(lambda: begin_generation(self._llm, header, buffer))
                await self._send(context, "generate", pb.GenerateReply(tokens=state.last.tolist()))
                dtype = codec.wire_dtype(packed.dtype)
                size = len(packed.lengths) * codec.row_bytes(dtype, packed.hidden_size)
                while not state.done:
                    embeds = None
                    if header.client_embeds:
                        frame = await self._receive(context, "generate", size)
                        embeds = codec.decode_rows(frame.take(size), dtype, packed.hidden_size)
                    await self._pool.run(lambda e=embeds: state.advance(e))  # type: ignore[misc]
                    await self._send(context, "generate", pb.GenerateReply(tokens=state.last.tolist()))
            self._count(trace, header)

    def _sizes(
        self, header: pb.StepHeader | pb.GenerateHeader, *, per_token: int = 0, new_tokens: int = 0
    ) -> int:
        """Tensor bytes that a header announces, after all checks that need no tensor.

        Raises:
            HostRefused: out of bounds.
        """
        part, packed = self._llm.part, header.embeds
        if header.fingerprint and header.fingerprint != part.fingerprint:
            raise _OtherModelError(
                f"this host serves model {part.fingerprint[:12]}, the client expects {header.fingerprint[:12]}; "
                "start both with the same model, or connect anew"
            )
        if packed.hidden_size != part.hidden_size:
            raise HostRefused(f"hidden_size: got {packed.hidden_size}, expected {part.hidden_size}")
        token_bytes = codec.row_bytes(codec.wire_dtype(packed.dtype), packed.hidden_size)
        if not (math.isfinite(packed.scale) and packed.scale > 0):
            raise HostRefused(f"scale: got {packed.scale}, expected a positive finite number")
        nbytes = sum(packed.lengths) * (token_bytes + per_token)
        self._limits.check(packed.lengths, nbytes, new_tokens)
        longest = max(packed.lengths)
        if longest + new_tokens > part.max_positions:
            i = list(packed.lengths).index(longest)
            extra = f" and asks for {new_tokens} new ones" if new_tokens else ""
            raise HostRefused(
                f"sample {i} has {longest} tokens{extra}; the model has {part.max_positions} positions: shorten it"
            )
        return nbytes

    async def _header(self, context: _Context, trace: _Trace) -> Any:
        message = await self._next(context, trace.call)
        if message is None or message.WhichOneof("frame") != "header":
            raise HostRefused(f"{trace.call}: got no header, expected it as the first message")
        trace.request = message.header.request_id[:64]
        return message.header

    async def _receive(self, context: _Context, call: str, nbytes: int) -> codec.Assembler:
        """Collect ``nbytes`` of chunks."""
        buffer = codec.Assembler(nbytes, call)
        while not buffer.complete:
            message = await self._next(context, call)
            if message is None:
                # The stream of a caller that left ends first; that it was cancelled is known a moment later.
                await asyncio.sleep(_LEAVE_SECONDS)
                buffer.take(0)  # says how many bytes are missing
            elif message.WhichOneof("frame") != "chunk":
                raise HostRefused(f"{call}: got a second header, expected chunks")
            else:
                buffer.add(message.chunk)
        return buffer

    async def _next(self, context: _Context, call: str) -> Any:
        async with asyncio.timeout(self._limits.idle_seconds):
            message = await context.read()
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]
            return None
        self._stats.add(f"{call}_received_bytes", message.ByteSize())
        return message

    async def _send(self, context: _Context, call: str, message: Any) -> None:
        async with asyncio.timeout(self._limits.idle_seconds):
            await context.write(message)
        self._stats.add(f"{call}_sent_bytes", message.ByteSize())

    def _count(self, trace: _Trace, header: Any) -> None:
        samples, tokens = len(header.embeds.lengths), sum(header.embeds.lengths)
        self._stats.add(f"{trace.call}_done")
        self._stats.add(f"{trace.call}_samples", samples)
        self._stats.add(f"{trace.call}_tokens", tokens)
        log.debug("%s: %d samples, %d tokens, %.3f s", trace, samples, tokens, time.monotonic() - trace.began)

    @asynccontextmanager
    async def _call(self, context: _Context, call: str) -> AsyncIterator[_Trace]:
        """Check the token, and turn whatever goes wrong into a status."""
        self._stats.add(f"{call}_requests")
        trace, status = _Trace(call, context.peer()), grpc.StatusCode
        try:
            if self._verifier is not None:
                metadata = dict(context.invocation_metadata() or ())
                token = parse_bearer(metadata.get("authorization"))
                self._verifier.verify(token, method=call, peer=context.peer())
            yield trace
        except asyncio.CancelledError:
            self._stats.add("cancelled")
            raise
        except TokenRefusedError as error:
            await self._abort(context, trace, status.UNAUTHENTICATED, "auth", str(error))
        except _OtherModelError as error:
            await self._abort(context, trace, status.FAILED_PRECONDITION, "model", str(error))
        except (HostRefused, ConfigError) as error:
            await self._abort(context, trace, status.INVALID_ARGUMENT, "invalid", str(error))
        except (BusyError, MemoryError, torch.OutOfMemoryError) as error:
            await self._abort(
                context, trace, status.RESOURCE_EXHAUSTED, "busy", str(error) or "out of memory"
            )
        except TimeoutError:
            text = f"the client neither sent nor took anything for {self._limits.idle_seconds:g} s"
            await self._abort(context, trace, status.DEADLINE_EXCEEDED, "idle", text)
        except Exception:
            log.exception("%s failed", trace)
            await self._abort(context, trace, status.INTERNAL, "internal", "the host failed; see its log")

    async def _abort(
        self, context: _Context, trace: _Trace, code: grpc.StatusCode, reason: str, text: str
    ) -> NoReturn:
        self._stats.add(f"refused_{reason}")
        log.info("%s refused (%s): %s", trace, reason, text)
        await context.abort(code, text, ((REASON_KEY, reason),))
        raise AssertionError("unreachable")


@dataclass
class _Trace:
    """Names one call in the log."""

    call: str
    peer: str
    request: str = ""
    began: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"{self.call} {self.request!r} of {self.peer}"


class _OtherModelError(HostRefused):
    """The client expects another model."""
