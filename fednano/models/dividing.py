"""The language part of a loaded model, and the proof that it is one.

That a split is right is not taken on trust: the loaded model is asked once whether its logits are its head's of its
decoder's hidden states, and whether no token sees those behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fednano.errors import ModelError
from fednano.models.fingerprint import fingerprint
from fednano.models.images import ImageUse, MaskMaker
from fednano.models.language import LanguagePart

__all__ = ["language_fingerprint", "language_part"]

_PROBE_TOKENS = 6


def language_part(
    model: Any,
    decoder: Any,
    head: nn.Linear,
    config: Any,
    name: str,
    *,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int,
    image_use: ImageUse = ImageUse.PLAIN,
    image_masks: MaskMaker | None = None,
) -> LanguagePart:
    """Cut the language part out of a model.

    Args:
        model: the whole, frozen; its vision side may be missing layers.
        decoder: its language model.
        head: its output head.
        config: of the decoder.
        name: for messages.
        eos_token_ids: tokens that end an answer.
        pad_token_id: what fills an answer after its end.
        image_use: what the decoder makes of images.
        image_masks: see `LanguagePart`.

    Raises:
        ModelError: the model's logits are not the head's of the decoder's hidden states, or it is not causal.
    """
    _probe(model, decoder, head, config.hidden_size, name)
    return LanguagePart(
        decoder=decoder,
        head=head,
        hidden_size=config.hidden_size,
        vocab_size=head.weight.shape[0],
        max_positions=config.max_position_embeddings,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        fingerprint=language_fingerprint(decoder, head),
        image_use=image_use,
        image_masks=image_masks,
    )


def language_fingerprint(decoder: Any, head: nn.Module) -> str:
    """One hash over the weights of a language part, but for the token table, which is the client's."""
    table = decoder.get_input_embeddings()
    parts = {name: module for name, module in decoder.named_children() if module is not table}
    return fingerprint({**parts, "head": head})


@torch.no_grad()
def _probe(model: Any, decoder: Any, head: Any, width: int, name: str) -> None:
    table = model.get_input_embeddings().weight
    ids = torch.arange(_PROBE_TOKENS, device=table.device).unsqueeze(0) % len(table)
    x = model.get_input_embeddings()(ids)  # (1, n, d)
    if x.shape[-1] != width:
        raise ModelError(f"{name} cannot be divided: its embeddings are not as wide as its hidden states.")
    positions = torch.arange(_PROBE_TOKENS, device=table.device).unsqueeze(0)

    def hidden(rows: torch.Tensor) -> torch.Tensor:
        found = decoder(inputs_embeds=rows, attention_mask=None, position_ids=positions, use_cache=False)
        states: torch.Tensor = found.last_hidden_state
        return states

    states = hidden(x)
    logits = model(inputs_embeds=x, use_cache=False).logits.float()
    if not _close(head(states).float(), logits):
        raise ModelError(
            f"{name} cannot be divided: its logits are not its head's of its hidden states; it changes them on the way "
            "(scaling or capping), which a host would leave out."
        )
    other = x.clone()
    other[:, -1] = other[:, 0]
    if not _close(hidden(other)[:, :-1].float(), states[:, :-1].float()):
        raise ModelError(f"{name} cannot be used: its tokens see those behind them, so it is not causal.")


def _close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).norm() <= 1e-3 * want.norm() + 1e-6)
