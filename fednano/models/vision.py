"""The vision side of a multimodal model: from images to rows of embeddings, by the model's own classes.

An image's features keep their layout in their shape: ``(n, d)`` for a model with one fixed number of tokens,
``(height, width, d)`` where the grid follows the image (Qwen2-VL), and ``(rows + 1, columns, n, d)`` for an image that
was cut into tiles (Idefics3, SmolVLM), with the whole image in the first place of the last row and zeros behind it.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fednano.errors import ModelError
from fednano.models.prompt import ImagePlace

__all__ = ["ImageSizes", "Unfold", "Vision", "image_place", "token_blocks", "token_count"]

_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"


class Vision(nn.Module):
    """Frozen encoder and connector.

    Args:
        inner: the model without its head; its decoder is left out here.
        decoder: that decoder.
        processor: the model's image processor.

    Raises:
        ModelError: the processor is set to what cannot be laid out.
    """

    def __init__(self, inner: Any, decoder: nn.Module, processor: Any) -> None:
        super().__init__()
        view = copy.copy(inner)
        view._modules = {name: child for name, child in inner.named_children() if child is not decoder}
        self.inner, self.processor = view, processor
        self._takes = set(inspect.signature(inspect.unwrap(inner.get_image_features)).parameters)
        self._tiles = hasattr(processor, "do_image_splitting")
        self._merge = int(getattr(inner.config.vision_config, "spatial_merge_size", 1))
        if getattr(processor, "do_pan_and_scan", None):
            raise ModelError(
                "the image processor cuts images by pan and scan, which is not supported; set do_pan_and_scan to "
                "false in the model's preprocessor_config.json."
            )

    def preprocess(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """Images (PIL) as the inputs of `encode`, by the model's own image processor."""
        given: Any = [[image] for image in images] if self._tiles else list(images)
        more = {"return_row_col_info": True} if self._tiles else {}
        made = self.processor(images=given, return_tensors="pt", **more)
        found: dict[str, Tensor] = {name: made[name] for name in self._takes if name in made}
        if self._tiles:
            for name in ("rows", "cols"):
                found[name] = torch.as_tensor(made[name]).reshape(-1)
        return found

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Features of each image, laid out as this module's shapes say."""
        weight = next(self.inner.parameters())
        given = {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
            if name in self._takes
        }
        features = list(self.inner.get_image_features(**given).pooler_output)
        if "image_grid_thw" in inputs:
            grids = [(int(h) // self._merge, int(w) // self._merge) for _, h, w in inputs["image_grid_thw"]]
            return [rows.view(*grid, rows.shape[-1]) for rows, grid in zip(features, grids, strict=True)]
        if "rows" in inputs:
            sizes = zip(inputs["rows"].tolist(), inputs["cols"].tolist(), strict=True)
            return [_tiled(rows, *size) for rows, size in zip(features, sizes, strict=True)]
        return features


def _tiled(rows: Tensor, height: int, width: int) -> Tensor:
    """Tokens of all tiles ``((height * width + 1) n, d)``, the whole image last, as ``(height + 1, width, n, d)``."""
    if not height * width:
        return rows
    tiles = rows.view(height * width + 1, -1, rows.shape[-1])
    found = tiles.new_zeros((height + 1) * width, *tiles.shape[1:])
    found[: len(tiles)] = tiles
    return found.view(height + 1, width, *tiles.shape[1:])


def token_blocks(features: Tensor) -> list[tuple[Tensor, int, int]]:
    """The runs of image tokens that features are made of: rows ``(n, d)``, and the grid of each run."""
    if features.dim() == 2:
        return [(features, 1, len(features))]
    if features.dim() == 3:
        return [(features.flatten(0, 1), *features.shape[:2])]
    tiles = features.flatten(0, 1)  # (R * C, n, d)
    count = len(tiles) - features.shape[1] + 1
    return [(tile, 1, len(tile)) for tile in tiles[:count]]


def image_place(config: Any, tokenizer: Any, name: str) -> ImagePlace:
    """How a model's prompts mark an image.

    Args:
        config: of the model.
        tokenizer: of the model.
        name: for messages.

    Raises:
        ModelError: the tokenizer lacks a token that marks images.
    """
    token_id = int(config.image_token_id)
    if getattr(config, "boi_token_id", None) is not None:
        begin, token, end = tokenizer.convert_ids_to_tokens(
            [config.boi_token_id, token_id, config.eoi_token_id]
        )
        if None in (begin, token, end):
            raise ModelError(
                f"the tokenizer of {name!r} lacks the tokens around images ({config.boi_token_id}, {token_id}, "
                f"{config.eoi_token_id})."
            )
        return ImagePlace(token_id, begin, f"\n\n{begin}{token}{end}\n\n")
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        raise ModelError(f"the tokenizer of {name!r} lacks the image placeholder, token id {token_id}.")
    if getattr(config, "scale_factor", None) is not None:
        known = tokenizer.get_vocab()
        if _FAKE not in known:
            raise ModelError(f"the tokenizer of {name!r} lacks {_FAKE}, which stands around images.")
        return ImagePlace(token_id, token, f"{_FAKE}{_GLOBAL}{token}{_FAKE}")
    return ImagePlace(token_id, token, token)


class Unfold:
    """Puts one image token for each run of image tokens into a prompt that has one for the whole image.

    Args:
        tokenizer: of the model.
        place: how its prompts mark an image.
    """

    def __init__(self, tokenizer: Any, place: ImagePlace) -> None:
        self._tokenizer, self._place = tokenizer, place
        self._tiles: dict[tuple[int, int], tuple[int, ...]] = {}

    def __call__(self, ids: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
        """The ids for an image whose features have ``shape``."""
        if len(shape) < 4:
            return tuple(ids)
        size = (shape[0] - 1, shape[1])
        if size not in self._tiles:
            self._tiles[size] = tuple(self._ids(self._text(*size)))
        at = list(ids).index(self._place.token_id) - len(self._ids(_FAKE + _GLOBAL))
        return (*ids[:at], *self._tiles[size], *ids[at:])

    def _text(self, rows: int, columns: int) -> str:
        """What stands before the whole image where it was also cut into tiles."""
        token = self._place.shown
        lines = [
            "".join(f"{_FAKE}<row_{row + 1}_col_{column + 1}>{token}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        return "".join(lines) + "\n"

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


class ImageSizes:
    """The shapes of images' features, without encoding them.

    Args:
        config: of the model.
        processor: its image processor; not needed for a model whose images all become equally many tokens.
    """

    def __init__(self, config: Any, processor: Any = None) -> None:
        self._config, self._processor = config, processor

    @staticmethod
    def vary(config: Any) -> bool:
        """Whether the number of tokens depends on the image."""
        vision = config.vision_config
        return hasattr(vision, "spatial_merge_size") or getattr(config, "scale_factor", None) is not None

    def of(self, image: Any) -> tuple[int, ...]:
        """Shape of the features of an image (PIL), as `Vision.encode` gives it."""
        config, vision = self._config, self._config.vision_config
        width = config.get_text_config().hidden_size
        if getattr(config, "mm_tokens_per_image", None) is not None:
            return (config.mm_tokens_per_image, width)
        if not self.vary(config):
            whole = int(getattr(config, "vision_feature_select_strategy", "") == "full")
            return ((vision.image_size // vision.patch_size) ** 2 + whole, width)
        if hasattr(vision, "spatial_merge_size"):
            _, rows, columns = self._processor(images=[image], return_tensors="pt")["image_grid_thw"][
                0
            ].tolist()
            return (rows // vision.spatial_merge_size, columns // vision.spatial_merge_size, width)
        made = self._processor(images=[[image]], return_tensors="pt", return_row_col_info=True)
        (rows,), (columns,) = made["rows"][0], made["cols"][0]
        tokens = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
        return (rows + 1, columns, tokens, width) if rows * columns else (tokens, width)


def token_count(shape: Sequence[int]) -> int:
    """Image tokens of features of ``shape``."""
    if len(shape) < 4:
        return math.prod(shape[:-1])
    return ((shape[0] - 1) * shape[1] + 1) * shape[2]
