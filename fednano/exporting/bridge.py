"""Bridges between edge and language model, written as changes of the modules in front of them.

Inside the whole model there is no module where a bridge stands. But a bridge whose change is one matrix ``M``
(``y = x + M x``) follows a linear map, so it can be written into that map:

======  ====================================  ==========================================
stream  module in front of the bridge         change
======  ====================================  ==========================================
image   connector's last layer, ``W h + b``   ``W + M W`` and ``b + M b``
text    token table ``E`` (a row per token)   ``E + E M^T``
======  ====================================  ==========================================

Both are exact. If ``M = B A`` has rank r, so have the changes: ``M W = B (A W)`` and ``E M^T = (A E^T)^T B^T``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fednano.adapters import lora_factors
from fednano.errors import ModelError
from fednano.models.edge import NanoEdge

__all__ = ["Change", "changes"]


@dataclass(frozen=True)
class Change:
    """One stream's bridge as a change of one module of the whole model.

    Attributes:
        stream: ``"image"`` or ``"text"``.
        name: dotted name of the module in the whole model.
        module: the module, an ``nn.Linear`` or ``nn.Embedding``; it is not touched.
        a: ``(r, d)`` of the bridge's change ``M = b a``.
        b: ``(d, r)``.
        error: relative Frobenius error of ``b a`` against the adapter's own ``M``; 0 where factors were copied.
        full: ``(d, d)`` the adapter's own ``M``, float64.
    """

    stream: str
    name: str
    module: nn.Module
    a: Tensor
    b: Tensor
    error: float
    full: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        """LoRA factors of the module's change, ``A`` ``(r, d_in)`` and ``B`` ``(d_out, r)``, float32."""
        weight = _weight(self.module).detach().double().cpu()
        a = self.a.double() @ (weight if isinstance(self.module, nn.Linear) else weight.T)
        return a.float(), self.b.float()

    def bias(self) -> Tensor | None:
        """The changed bias ``(d,)`` for the factors, float32; ``None`` if the module has none."""
        bias = getattr(self.module, "bias", None)
        if not isinstance(bias, Tensor):
            return None
        old = bias.detach().double().cpu()
        return (old + self.b.double() @ (self.a.double() @ old)).float()

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapter's own change into the module, in place."""
        weight = _weight(self.module)
        old = weight.detach().double().cpu()
        moved = self.full @ old if isinstance(self.module, nn.Linear) else old @ self.full.T
        weight.copy_(old + moved)
        bias = getattr(self.module, "bias", None)
        if bias is not None:
            bias.copy_(bias.double().cpu() + self.full @ bias.double().cpu())


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


def changes(edge: NanoEdge, model: Any, *, rank: int | None = None) -> Iterator[Change]:
    """The bridges of ``edge`` as changes of ``model``, image before text.

    Args:
        edge: with the tuned adapters.
        model: the whole ``LlavaForConditionalGeneration`` with the same frozen weights.
        rank: rank of the factors; ``None`` keeps the adapter's own, without error where it has any.

    Raises:
        ModelError: an adapter's change is not one matrix, or the model's connector does not end in a linear layer.
    """
    places: dict[str, tuple[str, type[nn.Module]]] = {
        "image": ("model.multi_modal_projector.linear_2", nn.Linear),
        "text": ("model.language_model.embed_tokens", nn.Embedding),
    }
    for stream in sorted(edge.layers):
        layer = edge.layer(stream)
        if not layer.adapter.mergeable:
            raise ModelError(
                f"adapter {layer.adapter.spec!r} of the {stream} stream is not linear in its input, so no weight can "
                "hold it. Use --format safetensors, or tune with a linear adapter."
            )
        name, kind = places[stream]
        module = dict(model.named_modules()).get(name)
        if module is None or not isinstance(module, kind):
            raise ModelError(
                f"the model has no {kind.__name__} at {name!r}, where the {stream} stream's adapter would go. Use "
                "--format safetensors."
            )
        a, b, error = lora_factors(layer, rank)
        yield Change(stream, name, module, a.cpu(), b.cpu(), error, layer.delta().detach().double().cpu())
