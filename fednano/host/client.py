"""`RemoteLLM`: the language model of a host, behind the same interface as a local one.

Its loss is an autograd function whose forward pass makes the whole step on the host: losses come back
together with their gradients in the embeddings, which wait here for the backward pass. Since samples never
interact, the gradient of any weighting of the losses is the kept rows times the weights, so one round trip
serves every use.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fednano.errors import ConfigError, HostRefused
from fednano.host import codec
from fednano.host.channel import ClientTLS, HostChannel, Retry
from fednano.host.factored_client import FactoredExchange
from fednano.host.factored_codec import kept_dtype
from fednano.host.limits import HostInfo
from fednano.host.names import CHUNK_BYTES
from fednano.host.private_client import PrivateRequests
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.requests import Requests, host_info, split_batch
from fednano.host.wire import Meter, Wire
from fednano.models.factored import FactoredBatch
from fednano.models.images import Images, ImageUse, check_images
from fednano.models.language import TokenEmbedding
from fednano.models.language_inputs import IGNORE, check_inputs
from fednano.models.step import step_loss

__all__ = ["RemoteLLM"]


class RemoteLLM:
    """A `fednano.models.language.LanguageModel` served by a language host.

    Connects when first used. Usable from any thread; a copy in another process (pickled or forked) opens its
    own connection. A batch beyond the host's limits is sent in several requests.

    Args:
        address: ``HOST:PORT`` of the host, or several with commas between them that serve the same model: when one is
            away, the next is asked.
        token: bearer token.
        root_certificates: PEM certificates that signed the host's; ``None`` trusts those of the system.
        client_key: PEM key, if the host asks for client certificates.
        client_certificate: PEM chain that goes with it.
        insecure: plain text instead of TLS; accepted for loopback addresses only.
        timeout_s: deadline of one attempt at a request.
        retry_seconds: how long a request is repeated while the host is busy or away, from its first failure on.
        wire_dtype: type of embeddings and gradients on the wire: float32, bfloat16, float16, or int8 with a scale per
            token; ``None`` takes that of the embeddings (float32 for float64). A narrower type rounds both.
        factored: let the training loop use the factored exchange where the adapters allow it, see
            `fednano.models.factored`.
        head: the model's own head; with it labels and logits stay here, and steps are label-private: hidden states of
            the labelled positions come down, their gradient goes up.
        chunk_bytes: size of the pieces in which tensors are sent.
        lossless: leave out what repeats itself in those pieces, both ways, to the same bits: a third of the bytes in
            bfloat16, a sixth in float32, for some milliseconds a megabyte. See `fednano.host.planes`.

    Raises:
        ConfigError: an option is out of range or does not fit the others.
    """

    def __init__(
        self,
        address: str,
        *,
        token: bytes | None = None,
        root_certificates: bytes | None = None,
        client_key: bytes | None = None,
        client_certificate: bytes | None = None,
        insecure: bool = False,
        timeout_s: float = 120.0,
        retry_seconds: float = 60.0,
        wire_dtype: torch.dtype | None = None,
        factored: bool = False,
        head: nn.Module | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        lossless: bool = False,
    ) -> None:
        if factored and wire_dtype is not None:
            kept_dtype(wire_dtype)  # raises for a type that the exchange does not have
        if wire_dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.int8):
            raise ConfigError(
                f"wire_dtype: got {wire_dtype}, expected float32, bfloat16, float16, int8 or None"
            )
        if not 0 < chunk_bytes <= 3 << 20:
            raise ConfigError(f"chunk_bytes: got {chunk_bytes}, expected 1 to {3 << 20}")
        if insecure and (root_certificates or client_key or client_certificate):
            raise ConfigError("insecure=True goes without certificates: drop one or the other")
        if (client_key is None) != (client_certificate is None):
            raise ConfigError("client_key and client_certificate go together: give both or neither")
        tls = None if insecure else ClientTLS(root_certificates, client_key, client_certificate)
        self._options: dict[str, Any] = {
            "token": token,
            "root_certificates": root_certificates,
            "client_key": client_key,
            "client_certificate": client_certificate,
            "insecure": insecure,
            "timeout_s": timeout_s,
            "retry_seconds": retry_seconds,
            "wire_dtype": wire_dtype,
            "factored": factored,
            "head": head,
            "chunk_bytes": chunk_bytes,
            "lossless": lossless,
        }
        if factored and head is not None:
            raise ConfigError("factored and head exclude each other: a step is factored or label-private")
        self.wants_factored, self._head = factored, head
        self._factored: FactoredExchange | None = None
        self._wire_dtype, self._chunking = wire_dtype, codec.Chunking(chunk_bytes, lossless)
        self._meter, self._given = Meter(), address
        self._channel = HostChannel(
            address, token=token, tls=tls, retry=Retry(timeout_s, retry_seconds), meter=self._meter
        )
        self._info: HostInfo | None = None
        self._info_lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self._given, self._options)

    def __enter__(self) -> RemoteLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection. Calls after that raise `HostUnavailable`."""
        self._channel.close()

    def use_token(self, token: bytes) -> None:
        """Show another token from the next call on; the connection, and what the host keeps for it, stay."""
        self._options["token"] = token
        self._channel.use_token(token)

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the host that is asked now."""
        return self._channel.address

    @property
    def wire(self) -> Wire:
        """What has really been sent and received so far, by kind of call."""
        return self._meter.read()

    @property
    def hidden_size(self) -> int:
        """Width d of an input embedding."""
        return self.describe().hidden_size

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.describe().vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sample, prompt and answer together, in tokens."""
        return self.describe().max_positions

    def describe(self) -> HostInfo:
        """What the host serves and accepts; asked once.

        Raises:
            HostError: see `loss`.
            ConfigError: the host cannot do what this client was told to do.
        """
        with self._info_lock:
            if self._info is None:
                reply = self._channel.call(
                    "Describe", lambda e: e.unary(pb.DescribeRequest(), pb.DescribeReply)
                )
                info = host_info(reply)
                if self._chunking.lossless and not info.lossless:
                    raise ConfigError(
                        f"lossless: the host at {self.address} (version {info.version}) does not take coded chunks; "
                        "update it, or go without"
                    )
                self._info = info
            return self._info

    def stats(self) -> dict[str, int]:
        """Counters of the host, see `fednano.host.stats.Stats`."""
        reply = self._channel.call("Stats", lambda e: e.unary(pb.StatsRequest(), pb.StatsReply))
        return dict(reply.counters)

    def loss(
        self,
        embeds: Tensor,
        mask: Tensor,
        labels: Tensor,
        objective: str = "cross_entropy",
        images: Images = (),
    ) -> Tensor:
        """Loss of each sample, see `fednano.models.language.LanguageModel.loss`.

        The host computes the gradient too, in the same round trip, if ``embeds`` requires one.

        Args:
            embeds: ``(B, T, d)`` float.
            mask: ``(B, T)``.
            labels: ``(B, T)`` int64.
            objective: name of the token loss.
            images: of each sample; they travel only to a model that wants them.

        Returns:
            ``(B,)`` float32 on the device of ``embeds``.

        Raises:
            HostRefused: an input is not acceptable, or the token is not.
            HostUnavailable: nobody answered, or the host stayed busy, for ``retry_seconds``.
            ConfigError: unknown objective.
        """
        info = self.describe()
        _check_objective(info, objective)
        _check(info, embeds, mask, labels)
        images = _wanted(info, images, mask)
        mask, labels = mask.detach().cpu().bool(), labels.detach().cpu()

        def step(rows: Tensor, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
            losses, real = self._step(info, (rows, mask, labels), images, objective, want_gradient)
            if real is None:
                return losses, None
            gradient = real.new_zeros(*mask.shape, real.shape[1])
            gradient[mask] = real
            return losses, gradient

        return step_loss(embeds, step)

    def factored_loss(self, batch: FactoredBatch, objective: str = "cross_entropy") -> Tensor:
        """Loss of each sample by the factored exchange, differentiable once in each stream's z and up.

        A batch beyond the host's limits on one request takes the full exchange instead.

        Args:
            batch: B samples.
            objective: name of the token loss.

        Returns:
            ``(B,)`` float32 on the device of the batch.

        Raises:
            HostError, ConfigError: as `loss`.
        """
        info, dtype = self.describe(), self._dtype(batch.raw)
        lengths = batch.mask.sum(1).tolist()
        if len(split_batch(lengths, info, torch.float32)) > 1:
            return self.loss(batch.embeds(), batch.mask, batch.labels, objective, batch.images)
        _check_objective(info, objective)
        _check(info, batch.raw, batch.mask, batch.labels)
        with self._info_lock:
            if self._factored is None:
                self._factored = FactoredExchange(self._channel, info, dtype, self._chunking)
        return self._factored.loss(replace(batch, images=_wanted(info, batch.images, batch.mask)), objective)

    def score(self, embeds: Tensor, mask: Tensor, labels: Tensor, images: Images = ()) -> list[Tensor]:
        """What the model says of each labelled token, see `fednano.models.language.LanguageModel.score`.

        Args:
            embeds: ``(B, T, d)`` float.
            mask: ``(B, T)``.
            labels: ``(B, T)`` int64.
            images: of each sample.

        Returns:
            B tensors ``(n, 5)`` float64 on the CPU.

        Raises:
            HostError: as `loss`.
            ConfigError: steps are label-private, and scores would tell the host the labels.
        """
        if self._head is not None:
            raise ConfigError(
                "label-private steps keep labels from the host, and token scores would tell it them. Measure with the "
                "model in this process."
            )
        info = self.describe()
        _check(info, embeds, mask, labels)
        images = _wanted(info, images, mask)
        mask, labels, embeds = mask.detach().cpu().bool(), labels.detach().cpu(), embeds.detach().cpu()
        requests, dtype = self._requests(info), self._dtype(embeds)
        found: list[Tensor] = []
        for part in split_batch(mask.sum(1).tolist(), info, dtype):
            real = mask[part]
            lengths, wanted = real.sum(1).tolist(), labels[part][real]
            scores = requests.score(embeds[part][real], lengths, wanted, dtype=dtype, images=images[part])
            counts = [int((own[1:] != IGNORE).sum()) for own in torch.split(wanted, lengths)]
            found += torch.split(scores, counts)
        return found

    def generate(
        self,
        embeds: Tensor,
        mask: Tensor,
        max_new_tokens: int,
        embed: TokenEmbedding | None = None,
        images: Images = (),
    ) -> Tensor:
        """Greedy continuation, see `fednano.models.language.LanguageModel.generate`.

        With ``embed``, each new token costs one exchange on the open stream.

        Args:
            embeds: ``(B, T, d)`` float.
            mask: ``(B, T)``.
            max_new_tokens: at least 1.
            embed: adapted embedding of new tokens, or ``None``.
            images: of each prompt.

        Returns:
            ``(B, max_new_tokens)`` int64 on the CPU.

        Raises:
            HostRefused: an input is not acceptable, or the token is not.
            HostUnavailable: nobody answered, or the host stayed busy, for ``retry_seconds``.
        """
        if max_new_tokens < 1:
            raise HostRefused(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
        info = self.describe()
        _check(info, embeds, mask, None, max_new_tokens)
        images = _wanted(info, images, mask)
        mask = mask.detach().cpu().bool()
        requests, dtype = self._requests(info), self._dtype(embeds)
        answers = []
        for part in split_batch(mask.sum(1).tolist(), info, dtype):
            rows = embeds.detach().cpu()[part][mask[part]]
            lengths = mask[part].sum(1).tolist()
            answers.append(
                requests.generate(
                    rows, lengths, max_new_tokens, dtype=dtype, embed=embed, images=images[part]
                )
            )
        return torch.cat(answers)

    def _requests(self, info: HostInfo) -> Requests:
        if self._head is not None:
            return PrivateRequests(self._channel, info, self._chunking, self._head)
        return Requests(self._channel, info, self._chunking)

    def _dtype(self, embeds: Tensor) -> torch.dtype:
        """Type on the wire for ``embeds``."""
        if self._wire_dtype is not None:
            return self._wire_dtype
        return embeds.dtype if embeds.dtype != torch.float64 else torch.float32

    def _step(
        self,
        info: HostInfo,
        batch: tuple[Tensor, Tensor, Tensor],
        images: Images,
        objective: str,
        want_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Losses ``(B,)`` and, if wanted, gradient ``(N, d)`` of the N real tokens, both on the CPU."""
        embeds, mask, labels = batch
        requests, dtype = self._requests(info), self._dtype(embeds)
        embeds = embeds.cpu()
        losses, gradients = [], []
        for part in split_batch(mask.sum(1).tolist(), info, dtype):
            real = mask[part]
            loss, gradient = requests.step(
                embeds[part][real],
                real.sum(1).tolist(),
                labels[part][real],
                objective,
                dtype=dtype,
                want_gradient=want_gradient,
                images=images[part],
            )
            losses.append(loss)
            if gradient is not None:
                gradients.append(gradient)
        return torch.cat(losses), torch.cat(gradients) if want_gradient else None


def _check_objective(info: HostInfo, objective: str) -> None:
    if objective not in info.objectives:
        raise ConfigError(f"unknown objective {objective!r}: the host knows {', '.join(info.objectives)}")


def _check(info: HostInfo, embeds: Tensor, mask: Tensor, labels: Tensor | None, new_tokens: int = 0) -> None:
    check_inputs(
        embeds,
        mask,
        labels,
        hidden_size=info.hidden_size,
        vocab_size=info.vocab_size,
        max_positions=info.max_positions,
        new_tokens=new_tokens,
    )


def _wanted(info: HostInfo, images: Images, mask: Tensor) -> Images:
    """The images that travel: checked here, and none to a model to which their tokens are like text.

    Raises:
        HostRefused: an image is not inside its sample.
    """
    if images:
        check_images(images, mask.sum(1).tolist())
    return images if info.images != ImageUse.PLAIN else ()


def _remake(address: str, options: dict[str, Any]) -> RemoteLLM:
    return RemoteLLM(address, **options)
