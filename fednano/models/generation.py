"""Greedy decoding, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fednano.errors import ConfigError, HostRefused
from fednano.models.images import Images, decoder_inputs, next_positions
from fednano.models.language_inputs import align, check_token_embeds

if TYPE_CHECKING:
    from fednano.models.language import LocalLLM

__all__ = ["Generation"]


class Generation:
    """Greedy decoding that can pause between tokens, so that the caller may embed each new token itself.

    Args:
        llm: the model.
        embeds: ``(B, T, d)`` prompts.
        mask: ``(B, T)``.
        max_new_tokens: at least 1.
        images: of each prompt.

    Raises:
        HostRefused: an input is not acceptable.
    """

    @torch.no_grad()
    def __init__(
        self, llm: LocalLLM, embeds: Tensor, mask: Tensor, max_new_tokens: int, images: Images = ()
    ) -> None:
        if max_new_tokens < 1:
            raise HostRefused(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
        llm.check_prompts(embeds, mask, max_new_tokens, images)
        self._llm = llm
        x, self._mask, _ = align(embeds.to(llm.device, llm.dtype), mask.to(llm.device).bool(), "right")
        self._cache: Any = None
        self._step = 0
        self._ended = torch.zeros(len(x), dtype=torch.bool)
        self.tokens = torch.full((len(x), max_new_tokens), llm.part.pad_token_id, dtype=torch.int64)
        lengths, part = self._mask.sum(1).tolist(), llm.part
        self._position = next_positions(part.image_use, images, lengths).to(llm.device)  # (B,)
        self._run(x, decoder_inputs(part.image_use, part.image_masks, x, images, lengths))

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
        where = {"position_ids": self._position.unsqueeze(1), "attention_mask": self._mask.long()}
        self._position = self._position + 1
        self._run(embeds.to(llm.device, llm.dtype).unsqueeze(1), where)

    def _run(self, x: Tensor, where: dict[str, Any]) -> None:
        """Feed ``x`` ``(B, n, d)`` with its positions and mask; store each row's likeliest next token."""
        llm = self._llm
        with llm.passes.turn:
            out = llm.part.decoder(inputs_embeds=x, past_key_values=self._cache, use_cache=True, **where)
        self._cache = out.past_key_values
        head = llm.part.head
        last = out.last_hidden_state[:, -1].to(next(head.parameters()).device)  # (B, d)
        chosen = head(last).float().argmax(-1).cpu()  # (B,)
        chosen = torch.where(self._ended, llm.part.pad_token_id, chosen)
        self.tokens[:, self._step] = chosen
        self._step += 1
        self._ended |= torch.isin(chosen, torch.tensor(llm.part.eos_token_ids, dtype=torch.int64))
