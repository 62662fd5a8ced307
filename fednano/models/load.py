"""Load one side of a LLaVA model or of a text model, or both, through transformers' own classes.

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
from fednano.models.edge import EdgePart
from fednano.models.files import ModelFiles, find_model
from fednano.models.fingerprint import fingerprint
from fednano.models.language import LanguagePart
from fednano.models.prompt import load_text_processor
from fednano.models.quiet import quiet
from fednano.models.textual import is_textual, load_text_edge, load_text_language, text_class

__all__ = ["count_parameters", "load_edge", "load_head", "load_language", "load_whole", "split_model"]

_EDGE_KEYS = ("vision_tower.", "multi_modal_projector.", "embed_tokens.")
_LANGUAGE_KEYS = ("language_model.", "lm_head.")


def read_config(files: ModelFiles) -> Any:
    """The model's configuration.

    Raises:
        ModelError: it cannot be read, or is of a kind that cannot be divided.
    """
    from transformers import AutoConfig, LlavaConfig

    try:
        config = AutoConfig.from_pretrained(str(files.folder))
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"the configuration of {files.name!r} cannot be read: {first}") from error
    if not isinstance(config, LlavaConfig) and not is_textual(config):
        has_vision = hasattr(config, "vision_config")
        kind = (
            "a multimodal model of another family"
            if has_vision
            else "neither multimodal nor a causal text model"
        )
        raise ModelError(
            f"{files.name!r} is {kind} (model_type {config.model_type!r}). Expected a LLaVA model "
            "(model_type 'llava', class LlavaForConditionalGeneration), such as llava-hf/llava-1.5-7b-hf, or a causal "
            "text model such as Llama, Qwen, GPT-2 or Phi."
        )
    return config


def _llava() -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration


def _among(keys: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda key: any(part in key for part in keys)


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
    config = copy.deepcopy(full)
    without_layers(config.text_config)
    # The head is the language side's; tying it to the embeddings keeps the class whole at no cost.
    config.tie_word_embeddings = True
    config.text_config.tie_word_embeddings = True
    model = build(files, _llava(), config, _among(_EDGE_KEYS), dtype)
    return _edge_part(model, full, files).to(device)


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
    without_layers(config.vision_config)
    model = build(files, _llava(), config, _among(_LANGUAGE_KEYS), dtype)
    model.model.language_model.to(device)
    model.lm_head.to(device)
    return _language_part(model, files)


def load_head(name_or_path: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """Load the head alone, for clients that keep their labels; the token table in its place where the two are tied.

    Args and errors as for :func:`load_edge`.
    """
    files = find_model(name_or_path)
    config = copy.deepcopy(read_config(files))
    cls = text_class(config) if is_textual(config) else _llava()
    for part in (config,) if is_textual(config) else (config.text_config, config.vision_config):
        without_layers(part)
    with torch.device("meta"):
        bare = cls(config)
    bare.tie_weights()
    head, table = bare.get_output_embeddings(), bare.get_input_embeddings()
    source = table if head.weight is table.weight else head
    leaf = next(name for name, module in bare.named_modules() if module is source).rpartition(".")[2]
    model = build(files, cls, config, _among((f"{leaf}.",)), dtype)
    found: nn.Module = model.get_output_embeddings().to(device)
    return found


def load_whole(name_or_path: str) -> Any:
    """Load the undivided model, frozen, on the CPU, in the dtype of its configuration.

    Args and errors as for :func:`load_edge`.
    """
    files = find_model(name_or_path)
    config = read_config(files)
    dtype = getattr(config, "dtype", None) or torch.float32
    if is_textual(config):
        return build(files, text_class(config), config, lambda _: True, dtype)
    return build(files, _llava(), config, _among((*_EDGE_KEYS, *_LANGUAGE_KEYS)), dtype)


def split_model(model: Any, name_or_path: str) -> tuple[EdgePart, LanguagePart]:
    """Divide a loaded ``LlavaForConditionalGeneration`` into its two sides; both share its tensors.

    Args:
        model: the whole model; it is frozen and put into evaluation mode.
        name_or_path: where tokenizer and image processor are found.
    """
    files = find_model(name_or_path)
    model.requires_grad_(False).eval()
    return _edge_part(model, model.config, files), _language_part(model, files)


def _edge_part(model: Any, config: Any, files: ModelFiles) -> EdgePart:
    inner = model.model
    modules: dict[str, nn.Module] = {
        "vision_tower": inner.vision_tower,
        "connector": inner.multi_modal_projector,
        "token_embedding": inner.language_model.get_input_embeddings(),
    }
    tokenizer = load_text_processor(files)
    return EdgePart(
        **modules,
        tokenizer=tokenizer,
        image_processor=_image_processor(files),
        image_token_id=config.image_token_id,
        feature_layer=config.vision_feature_layer,
        feature_strategy=config.vision_feature_select_strategy,
        hidden_size=config.text_config.hidden_size,
        fingerprint=fingerprint(modules),
    )


def _image_processor(files: ModelFiles) -> Any:
    from transformers import AutoImageProcessor

    try:
        with quiet():  # it advertises torchvision, which is not needed
            return AutoImageProcessor.from_pretrained(files.repository or str(files.folder))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{files.name!r} has no image processor (preprocessor_config.json): {error}"
        ) from error


def _language_part(model: Any, files: ModelFiles) -> LanguagePart:
    text = model.config.text_config
    ids, pad = ending_ids(files, text, model.config)
    decoder, head = model.model.language_model, model.lm_head
    return LanguagePart(
        decoder=decoder,
        head=head,
        hidden_size=text.hidden_size,
        vocab_size=head.weight.shape[0],
        max_positions=text.max_position_embeddings,
        eos_token_ids=ids,
        pad_token_id=pad,
        fingerprint=fingerprint({"decoder": decoder.layers, "norm": decoder.norm, "head": head}),
    )


def count_parameters(name_or_path: str) -> dict[str, int]:
    """Numbers of parameters of the whole model and of its edge part, from the configuration alone.

    Returns:
        ``{"model": ..., "edge": ...}``; tied weights count once.
    """
    config = read_config(find_model(name_or_path))
    textual = is_textual(config)
    with torch.device("meta"):
        model = (text_class(config) if textual else _llava())(config)
    model.tie_weights()
    edge = [model.get_input_embeddings()]
    if not textual:
        edge += [model.model.vision_tower, model.model.multi_modal_projector]
    return {
        "model": sum(parameter.numel() for parameter in model.parameters()),
        "edge": sum(parameter.numel() for part in edge for parameter in part.parameters()),
    }
