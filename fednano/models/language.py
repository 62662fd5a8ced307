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

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from fednano.adapters.fused import kernels_for
from fednano.errors import ConfigError, HostRefused
from fednano.models.language_inputs import IGNORE, align, check_inputs, check_token_embeds
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

    def loss(self, embeds: Tensor, mask: Tensor, labels: Tensor, objective: str = "cross_entropy") -> Tensor:
        """Loss of each sample: the objective's mean over its own labelled tokens. Differentiable in
        ``embeds``.

        Args:
            embeds: ``(B, T, d)`` float, finite.
            mask: ``(B, T)`` bool or 0/1 integers, true at real tokens, which are contiguous in each row
                (padding left, right or both).
            labels: ``(B, T)`` int64; ``-100`` means no loss. The label at t is predicted from t - 1, so that
                the one at a sample's first token counts for nothing. Padding must not carry labels.
            objective: a name from `fednano.training.objectives`.

        Returns:
            ``(B,)`` float32. Row i depends on sample i alone, so a caller may weigh the rows freely.

        Raises:
            HostRefused: an input is not acceptable; the message names the sample, what was got, what was
            expected. ConfigError: unknown objective.
        """
        ...

    def generate(
        self, embeds: Tensor, mask: Tensor, max_new_tokens: int, embed: TokenEmbedding | None = None
    ) -> Tensor:
        """Greedy continuation of each prompt.

        Args:
            embeds: ``(B, T, d)`` float, finite: the embedded prompts.
            mask: ``(B, T)`` as in `loss`.
            max_new_tokens: how many tokens to produce at most, at least 1.
            embed: maps new tokens ``(B,)`` to embeddings ``(B, d)``, for edges that adapt token embeddings.
                ``None`` uses the model's own frozen table.

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
    """

    decoder: nn.Module
    head: nn.Module
    hidden_size: int
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    fingerprint: str


class LocalLLM:
    """A `LanguageModel` in this process. Safe to call from several threads at once.

    The modules of ``part`` are switched to evaluation and frozen in place: no call gives a weight a gradient.

    Args:
        part: the language half of a model, already on its device and in its dtype.
    """

    def __init__(self, part: LanguagePart) -> None:
        self.part = part
        for module in (part.decoder, part.head):
            module.eval().requires_grad_(False)
        weight = next(part.decoder.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        # Rotary embeddings of these kinds rewrite their own buffers during a forward pass.
        kinds = [str(getattr(m, "rope_type", "")) for m in part.decoder.modules()]
        stateful = any("dynamic" in kind or "longrope" in kind for kind in kinds)
        self._turn: AbstractContextManager[Any] = threading.Lock() if stateful else nullcontext()

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

    def loss(self, embeds: Tensor, mask: Tensor, labels: Tensor, objective: str = "cross_entropy") -> Tensor:
        """Loss of each sample, see `LanguageModel.loss`.

        Logits exist only for tokens that carry a label: ``(N, V)``, never ``(B, T, V)``.

        Args:
            embeds: ``(B, T, d)`` float.
            mask: ``(B, T)``.
            labels: ``(B, T)`` int64.
            objective: name of the token loss.

        Returns:
            ``(B,)`` float32 on the device of ``embeds`` (float64 when the model itself is float64).
        """
        return step_loss(
            embeds, lambda rows, want: self.loss_and_gradient(rows, mask, labels, objective, want)
        )

    def check(self, embeds: Tensor, mask: Tensor, labels: Tensor, objective: str = "cross_entropy") -> None:
        """Raise what `loss` would raise, without computing. Arguments and errors as there."""
        from fednano.training.objectives import get_objective  # not at the top: training imports models

        get_objective(objective)
        self._check(embeds, mask, labels)

    def loss_and_gradient(
        self, embeds: Tensor, mask: Tensor, labels: Tensor, objective: str, want_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Losses ``(B,)`` as in `loss` and, if wanted, the gradient ``(B, T, d)`` of their sum, outside of any graph.

        Args:
            embeds: ``(B, T, d)`` float, without a graph.
            mask: ``(B, T)``.
            labels: ``(B, T)`` int64.
            objective: name of the token loss.
            want_gradient: whether to go backward.

        Raises:
            HostRefused, ConfigError: as `loss`.
        """
        self.check(embeds, mask, labels, objective)
        rows = embeds.detach().requires_grad_(want_gradient)
        with torch.set_grad_enabled(want_gradient):
            losses = self._losses(rows, mask, labels, objective)
            return losses.detach(), torch.autograd.grad(losses.sum(), rows)[0] if want_gradient else None

    def _losses(self, embeds: Tensor, mask: Tensor, labels: Tensor, objective: str) -> Tensor:
        """Losses ``(B,)`` on the model's device, as a graph over ``embeds``."""
        x, real, index = align(embeds.to(self.device, self.dtype), mask.to(self.device).bool(), "left")
        y = labels.to(self.device).gather(1, index)  # (B, L)
        keep = real[:, 1:] & (y[:, 1:] != IGNORE)  # (B, L - 1)
        positions = torch.arange(x.shape[1], device=self.device).unsqueeze(0)
        with self._turn:
            out = self.part.decoder(
                inputs_embeds=x, attention_mask=None, position_ids=positions, use_cache=False
            )
        hidden = out.last_hidden_state[:, :-1][keep]  # (N, d)
        tokens = self._token_losses(hidden, y[:, 1:][keep], objective)  # (N,)
        # Sample by sample rather than by a scatter: the order of the sum is that of the lone sample.
        return torch.stack([t.mean() for t in torch.split(tokens, keep.sum(1).tolist())])

    def _token_losses(self, hidden: Tensor, labels: Tensor, objective: str) -> Tensor:
        """Loss ``(N,)`` of each label ``(N,)`` predicted from ``hidden`` ``(N, d)``; logits never whole on a GPU."""
        from fednano.training.objectives import get_objective

        head, kernels = self.part.head, kernels_for(hidden)
        plain = type(head) is nn.Linear and head.bias is None
        if kernels is None or not plain or objective not in kernels.OBJECTIVES or objective == "npo":
            return get_objective(objective)(head(hidden), labels)
        losses: Tensor = kernels.linear_token_loss(
            hidden, head.weight, labels, objective, labelled_rows=len(labels)
        )
        return losses

    def generate(
        self, embeds: Tensor, mask: Tensor, max_new_tokens: int, embed: TokenEmbedding | None = None
    ) -> Tensor:
        """Greedy continuation with a key-value cache, see `LanguageModel.generate`.

        Args:
            embeds: ``(B, T, d)`` float.
            mask: ``(B, T)``.
            max_new_tokens: at least 1.
            embed: adapted embedding of new tokens, or ``None``.

        Returns:
            ``(B, max_new_tokens)`` int64 on the CPU.
        """
        state = Generation(self, embeds, mask, max_new_tokens)
        while not state.done:
            state.advance(None if embed is None else embed(state.last))
        return state.tokens

    def _check(self, embeds: Tensor, mask: Tensor, labels: Tensor | None, new_tokens: int = 0) -> None:
        p = self.part
        sizes = {"hidden_size": p.hidden_size, "vocab_size": p.vocab_size, "max_positions": p.max_positions}
        check_inputs(embeds, mask, labels, **sizes, new_tokens=new_tokens)


class Generation:
    """Greedy decoding that can pause between tokens, so that the caller may embed each new token itself.

    Args:
        llm: the model.
        embeds: ``(B, T, d)`` prompts.
        mask: ``(B, T)``.
        max_new_tokens: at least 1.

    Raises:
        HostRefused: an input is not acceptable.
    """

    @torch.no_grad()
    def __init__(self, llm: LocalLLM, embeds: Tensor, mask: Tensor, max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise HostRefused(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
        llm._check(embeds, mask, None, max_new_tokens)
        self._llm = llm
        x, self._mask, _ = align(embeds.to(llm.device, llm.dtype), mask.to(llm.device).bool(), "right")
        self._cache: Any = None
        self._step = 0
        self._ended = torch.zeros(len(x), dtype=torch.bool)
        self.tokens = torch.full((len(x), max_new_tokens), llm.part.pad_token_id, dtype=torch.int64)
        self._run(x, (self._mask.cumsum(1) - 1).clamp(min=0))

    @property
    def done(self) -> bool:
        """Whether every row has ended or the answer is full."""
        return self._step == self.tokens.shape[1] or bool(self._ended.all())

    @property
    def last(self) -> Tensor:
        """Newest token of each row ``(B,)`` int64, the padding id in rows that have ended."""
        return self.tokens[:, self._step - 1]

    @torch.no_grad()
    def advance(self, embeds: Tensor | None = None) -> None:
        """Append one token to each row that has not ended.

        Args:
            embeds: ``(B, d)`` embeddings of `last`, or ``None`` for the model's own table.

        Raises:
            HostRefused: wrong shape or non-finite values.
            ConfigError: the decoder has no embedding table and ``embeds`` is missing.
        """
        llm, (rows, _) = self._llm, self.tokens.shape
        if embeds is None:
            table = llm.part.decoder.get_input_embeddings()  # type: ignore[operator]
            if table is None:
                raise ConfigError("this decoder has no token embeddings: pass `embed` to generate")
            embeds = table(self.last.to(llm.device))
        check_token_embeds(embeds, rows, llm.hidden_size)
        self._mask = torch.cat([self._mask, self._mask.new_ones(rows, 1)], dim=1)
        self._run(embeds.to(llm.device, llm.dtype).unsqueeze(1), self._mask.sum(1, keepdim=True) - 1)

    def _run(self, x: Tensor, positions: Tensor) -> None:
        """Feed ``x`` ``(B, n, d)`` at ``positions`` ``(B, n)``; store each row's likeliest next token."""
        llm = self._llm
        with llm._turn:
            out = llm.part.decoder(
                inputs_embeds=x,
                attention_mask=self._mask.long(),
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        self._cache = out.past_key_values
        chosen = llm.part.head(out.last_hidden_state[:, -1]).float().argmax(-1).cpu()  # (B,)
        chosen = torch.where(self._ended, llm.part.pad_token_id, chosen)
        self.tokens[:, self._step] = chosen
        self._step += 1
        self._ended |= torch.isin(chosen, torch.tensor(llm.part.eos_token_ids, dtype=torch.int64))
