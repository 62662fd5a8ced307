"""Text-only causal models: the edge is the table of token embeddings, the rest is the language part.

Where the parts are is read off the model: its own embeddings, its own head, and between them its base model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fednano.errors import ModelError
from fednano.models.build import build, ending_ids, without_layers
from fednano.models.dividing import language_part
from fednano.models.edge import EdgePart
from fednano.models.files import ModelFiles
from fednano.models.fingerprint import fingerprint
from fednano.models.language import LanguagePart
from fednano.models.prompt import load_text_processor

__all__ = [
    "is_textual",
    "load_text_edge",
    "load_text_language",
    "table_keys",
    "text_class",
    "text_language",
]


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


def table_keys(config: Any) -> Callable[[str], bool]:
    """Whether a tensor of a checkpoint is the table of token embeddings.

    Raises:
        ModelError: the embeddings are not a part of their own.
    """
    cls = text_class(config)
    with torch.device("meta"):
        bare = cls(_small(config))
    leaf = next((name for name, part in bare.named_modules() if part is bare.get_input_embeddings()), "")
    if not leaf:
        raise ModelError(f"{cls.__name__} has no table of token embeddings to give to clients.")
    key = f"{leaf.rpartition('.')[2]}."
    return lambda name: key in name


def _small(config: Any) -> Any:
    """The same without layers, and with the table in the head's place."""
    small = copy.deepcopy(config)
    without_layers(small)
    small.tie_word_embeddings = True
    return small


def load_text_edge(files: ModelFiles, config: Any, *, dtype: torch.dtype, device: str) -> EdgePart:
    """The client's part: token embeddings, tokenizer. The decoder is never read.

    Raises:
        ModelError: weights are missing, or the embeddings are not a part of their own.
    """
    wanted = table_keys(config)
    table = build(files, text_class(config), _small(config), wanted, dtype).get_input_embeddings()
    edge = EdgePart(
        vision=None,
        token_embedding=table,
        tokenizer=load_text_processor(files),
        place=None,
        hidden_size=config.hidden_size,
        fingerprint=fingerprint({"token_embedding": table}),
    )
    edge.leave_table(files, wanted)
    return edge.to(device)


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
    config = model.config
    return language_part(
        model,
        decoder,
        head,
        config,
        f"{name!r} ({kind})",
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
    )
