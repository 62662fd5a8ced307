"""Build a real class of transformers from a configuration, and fill it with some of a checkpoint's tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from fednano.errors import ModelError
from fednano.models.files import ModelFiles, read_tensors
from fednano.models.prompt import load_text_processor
from fednano.models.quiet import quiet

__all__ = ["build", "ending_ids", "without_layers"]


def without_layers(config: Any) -> None:
    """Cut a tower or decoder down to zero layers, in place."""
    config.num_hidden_layers = 0
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = []
    if hasattr(config, "max_window_layers"):
        config.max_window_layers = 0


def build(files: ModelFiles, cls: Any, config: Any, wanted: Callable[[str], bool], dtype: torch.dtype) -> Any:
    """A model of ``cls`` and ``config``, frozen, filled with the checkpoint's tensors whose keys are ``wanted``.

    Raises:
        ModelError: tensors are missing, or do not fit.
    """
    tensors = read_tensors(files, wanted)
    try:
        with quiet():
            model, info = cls.from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
            )
    except RuntimeError as error:
        raise ModelError(f"the weights of {files.name!r} do not fit its configuration: {error}") from error
    mismatched = info.get("mismatched_keys") or []
    if mismatched:
        raise ModelError(
            f"the weights of {files.name!r} do not fit its configuration: {sorted(map(str, mismatched))[:3]}"
        )
    missing = sorted(key for key in info["missing_keys"] if wanted(key))
    if missing:
        raise ModelError(
            f"weights are missing: {files.name!r} lacks {len(missing)} tensors, among them {', '.join(missing[:3])}. "
            "Fetch the model again, or check that the folder is complete."
        )
    model.requires_grad_(False).eval()
    return model


def ending_ids(files: ModelFiles, *configs: Any) -> tuple[tuple[int, ...], int]:
    """Tokens that end an answer, and the one that fills it after that.

    Args:
        files: of the model, whose generation settings come first and whose tokenizer last.
        configs: to look into.
    """
    generation_file = files.file("generation_config.json")
    generation = json.loads(generation_file.read_text()) if generation_file is not None else {}

    def setting(name: str) -> Any:
        candidates = (
            generation.get(name),
            *(getattr(config, name, None) for config in configs),
            getattr(load_text_processor(files), name, None),
        )
        return next((value for value in candidates if value is not None), None)

    eos = setting("eos_token_id")
    ids = (eos,) if isinstance(eos, int) else tuple(eos or ())
    pad = setting("pad_token_id")
    if pad is None:
        pad = ids[0] if ids else 0
    return ids, pad
