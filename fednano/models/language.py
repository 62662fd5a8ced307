"""The frozen language half of a split model: what a step and an answer ask of it.

`LanguageModel` is all that training sees. `LocalLLM` computes in this process; ``fednano.host.RemoteLLM``
asks a language host. Both refuse the same inputs with the same messages, so the training loop cannot tell
which one it holds.

Padding is moved before the decoder runs: behind each sample for a loss (under causal attention, what comes
after a sample cannot reach it, so no attention mask is needed), before each prompt for generation (new tokens
are appended). Hence padding on either side gives the same result, and a sample in a padded batch gets what it
would get alone, up to the rounding of matrix products of another shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from fednano.models.generation import Generation
from fednano.models.images import Images, ImageUse, MaskMaker, check_images
from fednano.models.language_inputs import IGNORE, check_inputs
from fednano.models.memory import Memory
from fednano.models.passes import Passes
from fednano.models.step import step_loss

__all__ = [
    "IGNORE",
    "Generation",
    "LanguageModel",
    "LanguagePart",
    "LocalLLM",
    "TokenEmbedding",
    "check_inputs",
]

TokenEmbedding: TypeAlias = Callable[[Tensor], Tensor]
"""Maps token ids ``(B,)`` int64 to input embeddings ``(B, d)``."""


class LanguageModel(Protocol):
    """A frozen language model that turns embeddings into losses or answers. Samples never interact."""

    @property
    def hidden_size(self) -> int:
        """Width d of an input embedding."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def max_positions(self) -> int:
        """Longest sample, prompt and answer together, in tokens."""
        ...

    def loss(
        self,
        embeds: Tensor,
        mask: Tensor,
        labels: Tensor,
        objective: str = "cross_entropy",
        images: Images = (),
    ) -> Tensor:
        """Loss of each sample: the objective's mean over its own labelled tokens. Differentiable in
        ``embeds``.

        Args:
            embeds: ``(B, T, d)`` float, finite.
            mask: ``(B, T)`` bool or 0/1 integers, true at real tokens, which are contiguous in each row
                (padding left, right or both).
            labels: ``(B, T)`` int64; ``-100`` means no loss. The label at t is predicted from t - 1, so that
                the one at a sample's first token counts for nothing. Padding must not carry labels.
            objective: a name from `fednano.training.objectives`.
            images: where each sample's images stand; a model to which image tokens are like text needs none.

        Returns:
            ``(B,)`` float32. Row i depends on sample i alone, so a caller may weigh the rows freely.

        Raises:
            HostRefused: an input is not acceptable; the message names the sample, what was got, what was
            expected. ConfigError: unknown objective.
        """
        ...

    def score(self, embeds: Tensor, mask: Tensor, labels: Tensor, images: Images = ()) -> list[Tensor]:
        """What the model says of each labelled token; takes no gradient.

        Args:
            embeds: ``(B, T, d)`` as in `loss`.
            mask: ``(B, T)``.
            labels: ``(B, T)``.
            images: as in `loss`.

        Returns:
            B tensors ``(n, 5)`` float64 on the CPU, a row for each labelled token: its log-probability, whether it is
            the likeliest token (0 or 1), mean and standard deviation of the log-probability under the model's own
            distribution, and the log-probability of the likeliest other token.

        Raises:
            HostRefused: an input is not acceptable.
        """
        ...

    def generate(
        self,
        embeds: Tensor,
        mask: Tensor,
        max_new_tokens: int,
        embed: TokenEmbedding | None = None,
        images: Images = (),
    ) -> Tensor:
        """Greedy continuation of each prompt.

        Args:
            embeds: ``(B, T, d)`` float, finite: the embedded prompts.
            mask: ``(B, T)`` as in `loss`.
            max_new_tokens: how many tokens to produce at most, at least 1.
            embed: maps new tokens ``(B,)`` to embeddings ``(B, d)``, for edges that adapt token embeddings.
                ``None`` uses the model's own frozen table.
            images: as in `loss`.

        Returns:
            ``(B, max_new_tokens)`` int64, on the CPU; the padding id after the first end token.

        Raises:
            HostRefused: an input is not acceptable.
        """
        ...


@dataclass(frozen=True)
class LanguagePart:
    """The language half of a split model, as modules and plain facts.

    Attributes:
        decoder: causal Hugging Face decoder (``LlamaModel``, ``MistralModel``, ``Qwen2Model``, ...), called
            with ``inputs_embeds, attention_mask, position_ids``; returns ``last_hidden_state`` ``(B, T, d)``.
        head: maps hidden states ``(..., d)`` to logits ``(..., V)``.
        hidden_size: d.
        vocab_size: V.
        max_positions: context window in tokens.
        eos_token_ids: tokens that end an answer.
        pad_token_id: what fills an answer after its end.
        fingerprint: hex digest of the weights; two parts with one fingerprint give the same losses.
        image_use: what the decoder makes of image spans.
        image_masks: makes its attention masks where images see both ways inside.
    """

    decoder: nn.Module
    head: nn.Module
    hidden_size: int
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    fingerprint: str
    image_use: ImageUse = ImageUse.PLAIN
    image_masks: MaskMaker | None = None

    @property
    def devices(self) -> list[torch.device]:
        """Where the weights lie, each device once."""
        weights = (*self.decoder.parameters(), *self.head.parameters())
        return list(dict.fromkeys(weight.device for weight in weights))


class LocalLLM:
    """A `LanguageModel` in this process. Safe to call from several threads at once.

    The modules of ``part`` are switched to evaluation and frozen in place: no call gives a weight a gradient. On a GPU,
    batches go through it in parts that fit into its memory (`fednano.models.memory`), after `Passes.warm_up` has
    measured what a token takes.

    Args:
        part: the language half of a model, already on its device and in its dtype.
        compiled: compile the decoder's blocks with ``torch.compile``; the first passes then take a minute.
        memory: what is known of the device's memory; ``None`` asks CUDA, and plans nothing elsewhere.
        graphs: record passes as CUDA graphs, see `Passes`.

    Raises:
        ConfigError: graphs of a model that does not lie on one GPU.
    """

    def __init__(
        self,
        part: LanguagePart,
        *,
        compiled: bool = False,
        memory: Memory | None = None,
        graphs: bool = False,
    ) -> None:
        self.part = part
        for module in (part.decoder, part.head):
            module.eval().requires_grad_(False)
        weight = next(part.decoder.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.passes = Passes(part, compiled=compiled, memory=memory, graphs=graphs)

    @property
    def hidden_size(self) -> int:
        """Width d of an input embedding."""
        return self.part.hidden_size

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.part.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sample, prompt and answer together, in tokens."""
        return self.part.max_positions

    def loss(
        self,
        embeds: Tensor,
        mask: Tensor,
        labels: Tensor,
        objective: str = "cross_entropy",
        images: Images = (),
    ) -> Tensor:
        """Loss of each sample, see `LanguageModel.loss`.

        Logits exist only for tokens that carry a label: ``(N, V)``, never ``(B, T, V)``.

        Args:
            embeds: ``(B, T, d)`` float.
            mask: ``(B, T)``.
            labels: ``(B, T)`` int64.
            objective: name of the token loss.
            images: of each sample.

        Returns:
            ``(B,)`` float32 on the device of ``embeds`` (float64 when the model itself is float64).
        """
        return step_loss(
            embeds, lambda rows, want: self.loss_and_gradient(rows, mask, labels, objective, want, images)
        )

    def check(
        self,
        embeds: Tensor,
        mask: Tensor,
        labels: Tensor,
        objective: str = "cross_entropy",
        images: Images = (),
    ) -> None:
        """Raise what `loss` would raise, without computing. Arguments and errors as there."""
        from fednano.training.objectives import get_objective  # not at the top: training imports models

        get_objective(objective)
        self._check(embeds, mask, labels, images)

    def check_prompts(self, embeds: Tensor, mask: Tensor, new_tokens: int, images: Images = ()) -> None:
        """Raise what `generate` would raise, without computing. Arguments and errors as there."""
        self._check(embeds, mask, None, images, new_tokens)

    def loss_and_gradient(
        self,
        embeds: Tensor,
        mask: Tensor,
        labels: Tensor,
        objective: str,
        want_gradient: bool,
        images: Images = (),
    ) -> tuple[Tensor, Tensor | None]:
        """Losses ``(B,)`` as in `loss` and, if wanted, the gradient ``(B, T, d)`` of their sum, outside of any graph.

        Args:
            embeds: ``(B, T, d)`` float, without a graph.
            mask: ``(B, T)``.
            labels: ``(B, T)`` int64.
            objective: name of the token loss.
            want_gradient: whether to go backward.
            images: of each sample.

        Raises:
            HostRefused, ConfigError: as `loss`.
        """
        self.check(embeds, mask, labels, objective, images)
        return self.passes.compute(embeds, mask, labels, objective, want_gradient, images)

    @torch.no_grad()
    def score(self, embeds: Tensor, mask: Tensor, labels: Tensor, images: Images = ()) -> list[Tensor]:
        """What the model says of each labelled token, see `LanguageModel.score`; in float64 from the logits on.

        Args:
            embeds: ``(B, T, d)`` float.
            mask: ``(B, T)``.
            labels: ``(B, T)`` int64.
            images: of each sample.

        Returns:
            B tensors ``(n, 5)`` float64 on the CPU.
        """
        logits, wanted, counts = self.token_logits(embeds, mask, labels, images)
        log = logits.double().log_softmax(-1)  # (N, V)
        p = log.exp()
        mean = (p * log).sum(-1)
        deviation = (p * (log - mean[:, None]).square()).sum(-1).sqrt()
        own = log.gather(-1, wanted[:, None]).squeeze(-1)
        rival = log.scatter(-1, wanted[:, None], -torch.inf).max(-1).values
        right = (log.argmax(-1) == wanted).double()
        return list(torch.split(torch.stack([own, right, mean, deviation, rival], dim=1).cpu(), counts))

    def token_logits(
        self, embeds: Tensor, mask: Tensor, labels: Tensor, images: Images = ()
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Logits at every labelled token, as a graph over the embeddings; see `Passes.logits`.

        Args:
            embeds: ``(B, T, d)``.
            mask: ``(B, T)``.
            labels: ``(B, T)`` int64.
            images: of each sample.

        Raises:
            HostRefused: an input is not acceptable.
        """
        self._check(embeds, mask, labels, images)
        return self.passes.logits(embeds, mask, labels, images)

    def generate(
        self,
        embeds: Tensor,
        mask: Tensor,
        max_new_tokens: int,
        embed: TokenEmbedding | None = None,
        images: Images = (),
    ) -> Tensor:
        """Greedy continuation with a key-value cache, see `LanguageModel.generate`.

        Args:
            embeds: ``(B, T, d)`` float.
            mask: ``(B, T)``.
            max_new_tokens: at least 1.
            embed: adapted embedding of new tokens, or ``None``.
            images: of each prompt.

        Returns:
            ``(B, max_new_tokens)`` int64 on the CPU.
        """
        state = Generation(self, embeds, mask, max_new_tokens, images)
        while not state.done:
            state.advance(None if embed is None else embed(state.last))
        return state.tokens

    def _check(
        self, embeds: Tensor, mask: Tensor, labels: Tensor | None, images: Images, new_tokens: int = 0
    ) -> None:
        p = self.part
        sizes = {"hidden_size": p.hidden_size, "vocab_size": p.vocab_size, "max_positions": p.max_positions}
        check_inputs(embeds, mask, labels, **sizes, new_tokens=new_tokens)
        if images:
            check_images(images, mask.sum(1).tolist())
