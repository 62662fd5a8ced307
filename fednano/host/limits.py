"""What a host accepts, and what it says about itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from fednano.errors import ConfigError, HostRefused

__all__ = ["HostInfo", "HostLimits"]


@dataclass(frozen=True)
class HostLimits:
    """Bounds on requests. Each is checked before the tensors of a request are received.

    Attributes:
        max_batch: samples of one request.
        max_tokens: samples times the longest of them, of one request.
        max_new_tokens: tokens of one answer.
        max_request_bytes: tensor bytes of one request.
        max_requests: requests that may be received, waiting or computed at one time.
        max_buffered_bytes: tensor bytes of all those requests together.
        idle_seconds: how long the host waits for a client's next message.
        slowest_bytes: bytes a second; a request's tensors must come at least so fast, after ``idle_seconds`` of grace.
    """

    max_batch: int = 256
    max_tokens: int = 32_768
    max_new_tokens: int = 1_024
    max_request_bytes: int = 1 << 30
    max_requests: int = 128
    max_buffered_bytes: int = 4 << 30
    idle_seconds: float = 60.0
    slowest_bytes: int = 16_384

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"{field.name}: got {value}, expected a number above 0")

    def check(self, lengths: Sequence[int], nbytes: int, new_tokens: int = 0) -> None:
        """Refuse a request beyond the limits.

        Args:
            lengths: tokens of each sample.
            nbytes: tensor bytes of the request.
            new_tokens: tokens asked of each answer.

        Raises:
            HostRefused: naming the limit, what was got, and what to do.
        """
        if not lengths:
            raise HostRefused("lengths: got no sample, expected at least one")
        if min(lengths) < 1:
            raise HostRefused(f"lengths: sample {list(lengths).index(min(lengths))} has no token")
        area = len(lengths) * max(lengths)
        for name, got, allowed in (
            ("max_batch", len(lengths), self.max_batch),
            ("max_tokens", area, self.max_tokens),
            ("max_new_tokens", new_tokens, self.max_new_tokens),
            ("max_request_bytes", nbytes, self.max_request_bytes),
        ):
            if got > allowed:
                raise HostRefused(
                    f"request beyond {name}: got {got} ({len(lengths)} samples of up to {max(lengths)} tokens), "
                    f"expected at most {allowed}; send fewer or shorter samples at a time"
                )


@dataclass(frozen=True)
class HostInfo:
    """What `Describe` answers.

    Attributes:
        fingerprint: hex digest of the model's weights.
        hidden_size: width d of an input embedding.
        vocab_size: number of token ids.
        max_positions: context window in tokens.
        dtype: what the model computes in, such as ``"float32"``.
        eos_token_ids: tokens that end an answer.
        pad_token_id: what fills an answer after its end.
        objectives: names of the losses that may be asked for.
        limits: bounds on one request (those on the host as a whole stay at their defaults here).
        version: of the host's software.
        images: what the model makes of image spans: ``"plain"``, ``"grid"`` or ``"block"``.
        lossless: whether chunks may travel coded, see `fednano.host.planes`.
    """

    fingerprint: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    objectives: tuple[str, ...]
    limits: HostLimits
    version: str
    images: str = "plain"
    lossless: bool = False
