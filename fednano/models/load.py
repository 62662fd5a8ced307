"""Load one side of a multimodal model or of a text model, or both, through transformers' own classes.

Each side is the real class built from a changed configuration: the edge has a decoder of zero layers, the language
side a vision tower of zero layers. So transformers does all that is specific to a model: key conversion of old
checkpoints, dtype, tied weights.
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
from fednano.models.files import ModelFiles, find_model
from fednano.models.fingerprint import fingerprint
from fednano.models.language import LanguagePart
from fednano.models.multimodal import (
    FAMILIES,
    bare,
    image_use,
    is_multimodal,
    multimodal_class,
    sides_of,
    without_side,
)
from fednano.models.prompt import load_text_processor
from fednano.models.quiet import quiet
from fednano.models.textual import is_textual, load_text_edge, load_text_language, table_keys, text_class
from fednano.models.vision import Vision, image_place

__all__ = [
    "count_parameters",
    "edge_keys",
    "head_keys",
    "load_edge",
    "load_head",
    "load_image_processor",
    "load_language",
    "load_whole",
    "read_config",
    "split_model",
]


def read_config(files: ModelFiles) -> Any:
    """The model's configuration.

    Raises:
        ModelError: it cannot be read, or is of a kind that cannot be divided.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(files.folder))
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"the configuration of {files.name!r} cannot be read: {first}") from error
    if not is_multimodal(config) and not is_textual(config):
        has_vision = hasattr(config, "vision_config")
        kind = (
            "a multimodal model of another family"
            if has_vision
            else "neither multimodal nor a causal text model"
        )
        raise ModelError(
            f"{files.name!r} is {kind} (model_type {config.model_type!r}). Expected a LLaVA (such as "
            "llava-hf/llava-1.5-7b-hf), Qwen2-VL, Qwen2.5-VL, Idefics3, SmolVLM or Gemma 3 model "
            f"(model_type {', '.join(FAMILIES)}), or a causal text model such as Llama, Qwen, GPT-2 or Phi."
        )
    return config


def _among(keys: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda key: any(part in key for part in keys)


_in_table = _among(("embed_tokens.",))


def _class_of(config: Any) -> Any:
    """transformers' class of the whole model."""
    return text_class(config) if is_textual(config) else multimodal_class(config)


def _layerless(config: Any) -> Any:
    """The same model without layers on either side."""
    bared = copy.deepcopy(config)
    for part in (bared,) if is_textual(bared) else (bared.text_config, bared.vision_config):
        without_layers(part)
    return bared


def _keys(config: Any) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    """Which keys of a checkpoint, in whatever of its formats, the vision side and the language side need."""
    vision = _among(tuple(f"{name}." for name in sides_of(bare(config)).vision))
    return vision, lambda key: not vision(key)


def edge_keys(config: Any) -> Callable[[str], bool]:
    """Whether a tensor of a checkpoint belongs to the client's part.

    Args:
        config: of the whole model, see `read_config`.

    Raises:
        ModelError: a text model without a table of token embeddings of its own.
    """
    if is_textual(config):
        return table_keys(config)
    vision = _keys(config)[0]
    return lambda key: vision(key) or _in_table(key)


def head_keys(config: Any) -> Callable[[str], bool]:
    """Whether a tensor of a checkpoint is the head's; the token table's where the two are tied.

    Args and errors as for :func:`edge_keys`.
    """
    with torch.device("meta"):
        empty = _class_of(config)(_layerless(config))
    empty.tie_weights()
    head, table = empty.get_output_embeddings(), empty.get_input_embeddings()
    source = table if head.weight is table.weight else head
    leaf = next(name for name, module in empty.named_modules() if module is source).rpartition(".")[2]
    return _among((f"{leaf}.",))


def load_edge(name_or_path: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> EdgePart:
    """Load the client's part: vision tower, connector and token embeddings. The decoder is never read.

    Args:
        name_or_path: ``"tiny"``, a folder, or a Hugging Face id.
        dtype: dtype of the weights and of the embeddings that leave the edge.
        device: where to put them.

    Raises:
        ModelError: unknown model, another kind of model, or missing weights.
    """
    files = find_model(name_or_path)
    full = read_config(files)
    if is_textual(full):
        return load_text_edge(files, full, dtype=dtype, device=device)
    config = without_side(copy.deepcopy(full), vision=False)
    # The head is the language side's; tying it to the embeddings keeps the class whole at no cost.
    config.tie_word_embeddings = True
    config.text_config.tie_word_embeddings = True
    model = build(files, multimodal_class(full), config, edge_keys(full), dtype)
    edge = _edge_part(model, full, files)
    edge.leave_table(files, _in_table)
    return edge.to(device)


def load_language(
    name_or_path: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> LanguagePart:
    """Load the host's part: decoder and head. The vision tower is never read.

    Args and errors as for :func:`load_edge`.
    """
    files = find_model(name_or_path)
    config = copy.deepcopy(read_config(files))
    if is_textual(config):
        return load_text_language(files, config, dtype=dtype, device=device)
    _, language = _keys(config)
    model = build(files, multimodal_class(config), without_side(config, vision=True), language, dtype)
    sides = sides_of(model)
    sides.decoder.to(device)
    sides.head.to(device)
    return _language_part(model, files)


def load_head(name_or_path: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """Load the head alone, for clients that keep their labels; the token table in its place where the two are tied.

    Args and errors as for :func:`load_edge`.
    """
    files = find_model(name_or_path)
    config = read_config(files)
    model = build(files, _class_of(config), _layerless(config), head_keys(config), dtype)
    found: nn.Module = model.get_output_embeddings().to(device)
    return found


def load_whole(name_or_path: str) -> Any:
    """Load the undivided model, frozen, on the CPU, in the dtype of its configuration.

    Args and errors as for :func:`load_edge`.
    """
    files = find_model(name_or_path)
    config = read_config(files)
    dtype = getattr(config, "dtype", None) or torch.float32
    return build(files, _class_of(config), config, lambda _: True, dtype)


def split_model(model: Any, name_or_path: str) -> tuple[EdgePart, LanguagePart]:
    """Divide a loaded multimodal model into its two sides; both share its tensors.

    Args:
        model: the whole model; it is frozen and put into evaluation mode.
        name_or_path: where tokenizer and image processor are found.

    Raises:
        ModelError: it cannot be divided.
    """
    files = find_model(name_or_path)
    model.requires_grad_(False).eval()
    return _edge_part(model, model.config, files), _language_part(model, files)


def _edge_part(model: Any, config: Any, files: ModelFiles) -> EdgePart:
    sides = sides_of(model)
    table = sides.decoder.get_input_embeddings()
    tokenizer = load_text_processor(files)
    modules = {name: child for name, child in sides.inner.named_children() if name in sides.vision}
    return EdgePart(
        vision=Vision(sides.inner, sides.decoder, load_image_processor(files)),
        token_embedding=table,
        tokenizer=tokenizer,
        place=image_place(config, tokenizer, files.name),
        hidden_size=config.text_config.hidden_size,
        fingerprint=fingerprint({**modules, "token_embedding": table}),
    )


def load_image_processor(files: ModelFiles) -> Any:
    """The model's image processor.

    Raises:
        ModelError: the model has none.
    """
    from transformers import AutoImageProcessor

    try:
        with quiet():  # it advertises torchvision, which is not needed
            return AutoImageProcessor.from_pretrained(files.repository or str(files.folder))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{files.name!r} has no image processor (preprocessor_config.json): {error}"
        ) from error


def _language_part(model: Any, files: ModelFiles) -> LanguagePart:
    sides, text = sides_of(model), model.config.text_config
    ids, pad = ending_ids(files, text, model.config)
    use, masks = image_use(model)
    return language_part(
        model,
        sides.decoder,
        sides.head,
        text,
        f"{files.name!r} ({type(model).__name__})",
        eos_token_ids=ids,
        pad_token_id=pad,
        image_use=use,
        image_masks=masks,
    )


def count_parameters(name_or_path: str) -> dict[str, int]:
    """Numbers of parameters of the whole model and of its edge part, from the configuration alone.

    Returns:
        ``{"model": ..., "edge": ...}``; tied weights count once.
    """
    config = read_config(find_model(name_or_path))
    with torch.device("meta"):
        model = _class_of(config)(config)
    model.tie_weights()
    edge = [model.get_input_embeddings()]
    if not is_textual(config):
        sides = sides_of(model)
        edge += [child for name, child in sides.inner.named_children() if name in sides.vision]
    return {
        "model": sum(parameter.numel() for parameter in model.parameters()),
        "edge": sum(parameter.numel() for part in edge for parameter in part.parameters()),
    }
