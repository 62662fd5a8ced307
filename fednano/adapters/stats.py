"""Gather what data-driven bases need: the loss's gradient with respect to each site's full matrix.

A zero dense adapter is put on the sites; its gradient is the site's gradient, at linear, conv2d, embedding and
bridge sites alike, and with the same training loop that will train the adapter later, be the language model here or
behind a host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fednano.adapters.adapter_set import AdapterSet
from fednano.adapters.attach import attach
from fednano.adapters.dense import Dense
from fednano.errors import ModelError

__all__ = ["combine_gradients", "gradients_of", "probe"]


@contextmanager
def probe(model: nn.Module, patterns: str | Sequence[str]) -> Iterator[AdapterSet]:
    """Sum gradients while the block runs; the model is as before afterwards.

    ::

        with probe(model, "layers.*.q_proj") as adapters:
            for batch in data:
                loss(model, batch).backward()
            stats = gradients_of(adapters)
        attach(model, create("lora-sb"), "layers.*.q_proj", seed=0, stats=stats)

    Args:
        model: see `attach`.
        patterns: see `attach`.

    Yields:
        The dense adapters.
    """
    adapters = attach(model, Dense(), patterns, seed=0)
    try:
        yield adapters
    finally:
        adapters.detach()


def gradients_of(adapters: AdapterSet) -> dict[str, dict[str, Tensor]]:
    """Per site ``{"gradient": (d_out, d_in)}``: the sum over all backward passes since the adapters were made.

    Args:
        adapters: dense adapters, from `probe` or made for bridges with ``AdapterLayer(create("dense"), site, seed=0)``.

    Raises:
        ModelError: not dense, no backward pass reached a site, or a gradient is not finite.
    """
    gathered: dict[str, dict[str, Tensor]] = {}
    for name, layer in adapters.layers.items():
        if not isinstance(layer.adapter, Dense):
            raise ModelError(
                f"site {name!r} carries adapter {layer.adapter.name!r}; gradients are gathered with 'dense'"
            )
        gradient = layer.theta["D"].grad
        if gradient is None:
            raise ModelError(
                f"site {name!r}: no gradient; call backward() on a loss that depends on this site"
            )
        if not bool(torch.isfinite(gradient).all()):
            raise ModelError(
                f"site {name!r}: the gathered gradient has NaN or Inf; check the data and the loss scale"
            )
        gathered[name] = {"gradient": gradient.detach().clone()}
    return gathered


def combine_gradients(
    parts: Sequence[Mapping[str, Mapping[str, Tensor]]],
) -> dict[str, dict[str, Tensor]]:
    """Sum the clients' gradients in float64, in the order given.

    Raises:
        ModelError: the parts are of different sites.
    """
    if not parts or any(set(part) != set(parts[0]) for part in parts):
        raise ModelError(
            "gradients of different sites cannot be summed; gather them with the same patterns everywhere"
        )
    return {
        name: {"gradient": torch.stack([part[name]["gradient"].double() for part in parts]).sum(0)}
        for name in parts[0]
    }
