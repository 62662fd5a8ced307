"""Text-only causal models: the edge is the table of token embeddings, the rest is the language part.

Where the parts are is read off the model: its own embeddings, its own head, and between them its base model. That
the split is right is not taken on trust: a loaded model is asked once whether its logits are the head's of the base
model's hidden states, and whether no token sees those behind it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fednano.errors import ModelError
from fednano.models.build import build, ending_ids, without_layers
from fednano.models.edge import EdgePart
from fednano.models.files import ModelFiles
from fednano.models.fingerprint import fingerprint
from fednano.models.language import LanguagePart
from fednano.models.prompt import load_text_processor

__all__ = ["is_textual", "load_text_edge", "load_text_language", "text_class", "text_language"]

_PROBE_TOKENS = 6


def is_textual(config: Any) -> bool:
    """Whether a configuration is that of a causal text model, and of nothing more."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    more = ("vision_config", "audio_config", "text_config")
    if any(hasattr(config, name) for name in more) or getattr(config, "is_encoder_decoder", False):
        return False
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def text_class(config: Any) -> Any:
    """transformers' class of a causal text model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def load_text_edge(files: ModelFiles, config: Any, *, dtype: torch.dtype, device: str) -> EdgePart:
    """The client's part: token embeddings, tokenizer. The decoder is never read.

    Raises:
        ModelError: weights are missing, or the embeddings are not a part of their own.
    """
    small = copy.deepcopy(config)
    without_layers(small)
    small.tie_word_embeddings = True
    cls = text_class(config)
    with torch.device("meta"):
        bare = cls(small)
    leaf = next((name for name, part in bare.named_modules() if part is bare.get_input_embeddings()), "")
    if not leaf:
        raise ModelError(
            f"{files.name!r} ({cls.__name__}) has no table of token embeddings to give to clients."
        )
    key = f"{leaf.rpartition('.')[2]}."
    table = build(files, cls, small, lambda name: key in name, dtype).get_input_embeddings()
    return EdgePart(
        vision_tower=None,
        connector=None,
        token_embedding=table,
        tokenizer=load_text_processor(files),
        image_processor=None,
        image_token_id=-1,
        feature_layer=0,
        feature_strategy="full",
        hidden_size=config.hidden_size,
        fingerprint=fingerprint({"token_embedding": table}),
    ).to(device)


def load_text_language(files: ModelFiles, config: Any, *, dtype: torch.dtype, device: str) -> LanguagePart:
    """The host's part: decoder and head.

    Raises:
        ModelError: weights are missing, or the model cannot be divided.
    """
    model = build(files, text_class(config), config, lambda _: True, dtype).to(device)
    ids, pad = ending_ids(files, config)
    return text_language(model, files.name, eos_token_ids=ids, pad_token_id=pad)


def text_language(
    model: Any, name: str, *, eos_token_ids: tuple[int, ...], pad_token_id: int
) -> LanguagePart:
    """Divide a loaded causal text model.

    Args:
        model: of a class that transformers lists for causal language modelling, frozen.
        name: for messages.
        eos_token_ids: tokens that end an answer.
        pad_token_id: what fills an answer after its end.

    Raises:
        ModelError: its logits are not its head's of its base model's hidden states, or it is not causal.
    """
    decoder, head = model.base_model, model.get_output_embeddings()
    kind = type(model).__name__
    if decoder is model or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{name!r} ({kind}) cannot be divided: it has no base model and linear head of their own."
        )
    _probe(model, decoder, head, f"{name!r} ({kind})")
    config, table = model.config, model.get_input_embeddings()
    parts = {part: module for part, module in decoder.named_children() if module is not table}
    return LanguagePart(
        decoder=decoder,
        head=head,
        hidden_size=config.hidden_size,
        vocab_size=head.weight.shape[0],
        max_positions=config.max_position_embeddings,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        fingerprint=fingerprint({**parts, "head": head}),
    )


@torch.no_grad()
def _probe(model: Any, decoder: Any, head: Any, name: str) -> None:
    table = model.get_input_embeddings().weight
    ids = torch.arange(_PROBE_TOKENS, device=table.device).unsqueeze(0) % len(table)
    x = model.get_input_embeddings()(ids)  # (1, n, d)
    if x.shape[-1] != model.config.hidden_size:
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
