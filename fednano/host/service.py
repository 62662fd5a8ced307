"""The gRPC service: receives requests, checks them, has them computed, and answers in chunks."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from fednano import __version__
from fednano.errors import ConfigError, HostRefused
from fednano.host import codec
from fednano.host.batching import StepBatcher
from fednano.host.calls import Calls, Context, OtherModelError, SamplesNotKeptError, Trace
from fednano.host.compute import begin_generation, compute_scores, step_job
from fednano.host.factored_codec import parts_bytes
from fednano.host.factored_compute import factored_job, stream_counts, unpack_kept
from fednano.host.jobs import Reply
from fednano.host.kept import KeptSample, KeptSamples
from fednano.host.lane import Lane
from fednano.host.limits import HostLimits
from fednano.host.logs import event
from fednano.host.names import CHUNK_BYTES, LABEL_BYTES
from fednano.host.pool import ComputePool
from fednano.host.private_batching import Halves
from fednano.host.private_compute import (
    Graphs,
    Half,
    check_labelled,
    decode_gradient,
    encode_gradient,
    forward_jobs,
    private_job,
)
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.proto import language_host_pb2_grpc as pb_grpc
from fednano.host.security import TokenVerifier
from fednano.host.stats import Stats
from fednano.host.turns import Ask
from fednano.host.wire import chunk_message, coded_message
from fednano.models.language import LocalLLM

__all__ = ["LanguageHost"]

T = TypeVar("T")


class LanguageHost(Calls, pb_grpc.LanguageHostServicer):
    """The service over one `LocalLLM`.

    Args:
        llm: the model.
        pool: where to compute.
        limits: bounds on one request.
        stats: where to count.
        verifier: checks tokens; ``None`` admits everybody.
        chunk_bytes: size of the chunks of a reply.
        batch_tokens: see `fednano.host.batching.StepBatcher`.
        linger_seconds: likewise.
        kept: keeps the samples of the factored exchange.
        keep_graphs: how many label-private steps wait for their gradients with their graphs; others are computed again.
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
        linger_seconds: float = 0.0,
        kept: KeptSamples | None = None,
        keep_graphs: int = 8,
    ) -> None:
        self._steps = StepBatcher(llm, pool, stats, batch_tokens=batch_tokens, linger_seconds=linger_seconds)
        Calls.__init__(self, limits, stats, verifier, pool, locked=llm.device.type == "cuda")
        self._llm, self._chunk_bytes = llm, chunk_bytes
        graphs, self._lane = Graphs(keep_graphs), Lane(llm.device)
        self._forward, self._halves = partial(forward_jobs, graphs.open), Halves(self._work, graphs, stats)
        self._kept = kept if kept is not None else KeptSamples()

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeReply:  # noqa: N802
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
                images=part.image_use,
                lossless=True,
            )
        raise AssertionError("unreachable")

    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsReply:  # noqa: N802
        """Counters since the host started."""
        async with self._call(context, "stats"):
            return pb.StatsReply(counters={**self._stats.snapshot(), **self._kept.counters()})
        raise AssertionError("unreachable")

    async def Step(self, request: Any, context: Context) -> None:  # noqa: N802
        """One training step."""
        async with self._call(context, "step") as trace:
            header = await self._header(context, trace)
            body = self._sizes(header, per_token=LABEL_BYTES)
            async with self._admitted(trace, body):
                buffer = await self._receive(context, "step", body)
                ask = Ask(
                    header.objective,
                    header.want_gradient,
                    header.embeds.lengths,
                    lambda: step_job(self._llm, header, buffer),
                    header.request_id[:64],
                )
                reply = await self._steps.run(ask, trace.peer)
                await self._reply(context, "step", reply, lossless=header.lossless)
            self._count(trace, header.embeds.lengths)

    async def PrivateStep(self, request: Any, context: Context) -> None:  # noqa: N802
        """One training step whose labels stay with the client."""
        async with self._call(context, "private_step") as trace:
            header = await self._header(context, trace)
            body, packed = self._sizes(header), header.embeds
            check_labelled(header.labelled, packed.lengths)
            row = codec.row_bytes(codec.wire_dtype(packed.dtype), packed.hidden_size)
            async with self._admitted(trace, body + len(header.labelled) * row):
                buffer = await self._receive(context, "private_step", body)
                ask = Ask(
                    "",
                    header.want_gradient,
                    packed.lengths,
                    lambda: private_job(self._llm, header, buffer),
                    header.request_id[:64],
                    self._forward,
                )
                half, hidden, data = await self._steps.run(ask, trace.peer)
                self._halves.begin(half)
                try:
                    await self._send(context, "private_step", pb.PrivateReply(hidden=hidden))
                    await self._chunks(context, "private_step", [data], header.lossless)
                    if header.want_gradient:
                        back = await self._next(context, "private_step")
                        if back is None or back.WhichOneof("frame") != "gradient":
                            raise HostRefused("private step: expected the header of a gradient")
                        if (back.gradient.hidden_size, back.gradient.dtype) != (
                            packed.hidden_size,
                            packed.dtype,
                        ):
                            raise HostRefused("gradient: expected the width and type of the embeddings")
                        received = await self._receive(context, "private_step", len(header.labelled) * row)
                        own = await self._pool.carry(lambda: decode_gradient(back.gradient, received))
                        found = await self._halves.backward(half, own)
                        gradient, data = await self._pool.carry(lambda: self._encode(half, found, packed))
                        await self._send(context, "private_step", pb.PrivateReply(gradient=gradient))
                        await self._chunks(context, "private_step", [data], header.lossless)
                finally:
                    self._halves.leave(half)
            self._count(trace, packed.lengths)

    def _encode(self, half: Half, gradient: Tensor, packed: pb.Packed) -> tuple[pb.Packed, memoryview]:
        with self._lane.carrying():
            return encode_gradient(half, gradient, packed)

    async def _work(self, work: Callable[[], T]) -> T:
        """Run on a worker what the device computes, and wait until it has."""

        def job() -> T:
            with self._lane.computing():
                return work()

        return await self._pool.run(job)

    async def Score(self, request: Any, context: Context) -> None:  # noqa: N802
        """What the model says of each labelled token."""
        async with self._call(context, "score") as trace:
            header = await self._header(context, trace)
            body = self._sizes(header, per_token=LABEL_BYTES)
            async with self._admitted(trace, body):
                buffer = await self._receive(context, "score", body)
                scores = await self._pool.run(lambda: compute_scores(self._llm, header, buffer))
                await self._reply(context, "score", (pb.StepResult(), [scores]), lossless=header.lossless)
            self._count(trace, header.embeds.lengths)

    async def Keep(self, request: Any, context: Context) -> None:  # noqa: N802
        """Keep the frozen parts of samples for later steps."""
        async with self._call(context, "keep") as trace:
            header = await self._header(context, trace)
            body = self._sizes(header, per_token=LABEL_BYTES + 1)
            if len(header.keys) != len(header.embeds.lengths):
                raise HostRefused(
                    f"keys: got {len(header.keys)}, expected one for each of {len(header.embeds.lengths)} samples"
                )
            async with self._admitted(trace, body):
                buffer = await self._receive(context, "keep", body)
                keys, samples = await self._pool.carry(lambda: unpack_kept(header, buffer))
                for index, (key, given, sample) in enumerate(zip(keys, header.keys, samples, strict=True)):
                    if key != given:
                        raise HostRefused(
                            f"keys: sample {index} is called {given.hex()}, but its content is {key.hex()}; "
                            "the two sides disagree about the exchange: give both the same version"
                        )
                    self._kept.put(trace.bearer, key, sample)
                await self._send(context, "keep", pb.KeepReply())
            self._count(trace, header.embeds.lengths)

    async def FactoredStep(self, request: Any, context: Context) -> None:  # noqa: N802
        """One training step on kept samples."""
        async with self._call(context, "factored_step") as trace:
            header = await self._header(context, trace)
            samples, body = self._kept_samples(header, trace)
            async with self._admitted(trace, body):
                buffer = await self._receive(context, "factored_step", body)
                lengths = [len(sample.rows) for sample in samples]
                ask = Ask(
                    header.objective,
                    header.want_gradient,
                    lengths,
                    lambda: factored_job(
                        self._llm, header, samples, buffer, partial(self._kept.rows, trace.bearer)
                    ),
                    header.request_id[:64],
                )
                reply = await self._steps.run(ask, trace.peer)
                await self._reply(context, "factored_step", reply, lossless=header.lossless)
            self._count(trace, lengths)

    async def _reply(self, context: Context, call: str, reply: Reply, *, lossless: bool) -> None:
        header, parts = reply
        await self._send(context, call, pb.StepReply(header=header))
        await self._chunks(context, call, parts, lossless)

    async def _chunks(self, context: Context, call: str, parts: Sequence[memoryview], lossless: bool) -> None:
        for chunk in codec.views(parts, self._chunk_bytes):
            message = (
                await self._pool.carry(partial(coded_message, chunk)) if lossless else chunk_message(chunk)
            )
            await self._send(context, call, message)

    @asynccontextmanager
    async def _admitted(self, trace: Trace, nbytes: int) -> AsyncIterator[None]:
        """Hold a place for a request's tensors: in the bearer's allowance, then in the host's."""
        with self._quotas.hold(trace.bearer, trace.claims.allowance, nbytes):
            async with self._pool.admit(nbytes):
                yield

    def _kept_samples(self, header: pb.FactoredHeader, trace: Trace) -> tuple[list[KeptSample], int]:
        """The samples that a factored step names, and the bytes of low-rank parts that must follow."""
        self._check_model(header.fingerprint)
        width, found = self._llm.part.hidden_size, [self._kept.get(trace.bearer, key) for key in header.keys]
        samples = [sample for sample in found if sample is not None]
        if len(samples) < len(found):
            raise SamplesNotKeptError([index for index, sample in enumerate(found) if sample is None])
        if header.weights and len(header.weights) != len(samples):
            raise HostRefused(
                f"weights: got {len(header.weights)}, expected none, or one for each of {len(samples)} samples"
            )
        if not all(math.isfinite(weight) for weight in header.weights):
            raise HostRefused("weights: got a number that is not finite")
        if any(not 1 <= rank <= width for rank in header.ranks) or len(header.ranks) > 255:
            raise HostRefused(f"ranks: got {list(header.ranks)}, expected 1 to {width} for each stream")
        counts = stream_counts(samples, len(header.ranks))
        try:
            body = parts_bytes(counts, list(header.ranks), width, codec.wire_dtype(header.dtype))
        except ConfigError as error:
            raise HostRefused(str(error)) from error
        self._limits.check([len(sample.rows) for sample in samples], body)
        return samples, body

    async def Generate(self, request: Any, context: Context) -> None:  # noqa: N802
        """Greedy answers, one reply per token."""
        async with self._call(context, "generate") as trace:
            header = await self._header(context, trace)
            body = self._sizes(header, new_tokens=header.max_new_tokens)
            packed = header.embeds
            async with self._admitted(trace, body):
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
            self._count(trace, header.embeds.lengths)

    def _sizes(
        self,
        header: pb.StepHeader | pb.GenerateHeader | pb.KeepHeader | pb.PrivateHeader,
        *,
        per_token: int = 0,
        new_tokens: int = 0,
    ) -> int:
        """Tensor bytes that a header announces, after all checks that need no tensor.

        Raises:
            HostRefused: out of bounds.
        """
        part, packed = self._llm.part, header.embeds
        self._check_model(header.fingerprint)
        if packed.hidden_size != part.hidden_size:
            raise HostRefused(f"hidden_size: got {packed.hidden_size}, expected {part.hidden_size}")
        token_bytes = codec.row_bytes(codec.wire_dtype(packed.dtype), packed.hidden_size)
        if not (math.isfinite(packed.scale) and packed.scale > 0):
            raise HostRefused(f"scale: got {packed.scale}, expected a positive finite number")
        nbytes = sum(packed.lengths) * (token_bytes + per_token)
        self._limits.check(packed.lengths, nbytes, new_tokens)
        codec.images_of(packed)
        longest = max(packed.lengths)
        if longest + new_tokens > part.max_positions:
            i = list(packed.lengths).index(longest)
            extra = f" and asks for {new_tokens} new ones" if new_tokens else ""
            raise HostRefused(
                f"sample {i} has {longest} tokens{extra}; the model has {part.max_positions} positions: shorten it"
            )
        return nbytes

    def _check_model(self, fingerprint: str) -> None:
        mine = self._llm.part.fingerprint
        if fingerprint and fingerprint != mine:
            raise OtherModelError(
                f"this host serves model {mine[:12]}, the client expects {fingerprint[:12]}; "
                "start both with the same model, or connect anew"
            )

    def _count(self, trace: Trace, lengths: Sequence[int]) -> None:
        samples, tokens = len(lengths), sum(lengths)
        self._stats.add(f"{trace.call}_done")
        self._stats.add(f"{trace.call}_samples", samples)
        self._stats.add(f"{trace.call}_tokens", tokens)
        event("request done", trace.fields() | {"samples": samples, "tokens": tokens})
