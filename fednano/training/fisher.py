"""The diagonal empirical Fisher of a client's adapters, exact and per sample.

``F_j = mean over samples of (d log p(answer | sample) / d theta_j)^2`` with the data's own answers. The square of a
batch's mean gradient is another, much smaller quantity; per-sample gradients are needed and cheap here: the language
model returns each sample's own embedding gradient, and what remains is the adapter alone.

The log-likelihood of an answer is the sum over its tokens, so the per-sample mean loss is weighed by its token count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.training.data import ClientData

__all__ = ["empirical_fisher", "per_sample_gradients"]


def per_sample_gradients(
    edge: NanoEdge,
    llm: LanguageModel,
    data: ClientData,
    indices: Sequence[int],
    *,
    objective: str = "cross_entropy",
    by_token: bool = True,
) -> dict[str, Tensor]:
    """Gradients of each sample's negative log-likelihood, ``"<stream>.<leaf>"`` to ``(B, *leaf)``.

    Args:
        edge: with the adapters.
        llm: the language model.
        data: the client's samples.
        indices: which of them.
        objective: loss asked of the language model.
        by_token: weigh each sample's mean loss by its tokens, which gives the likelihood; without it, the gradients of
            the losses that training takes the mean of.
    """
    prompts, features = data.batch(indices)
    with torch.no_grad():
        batch = edge(prompts, features)
    embeds = batch.embeds.detach().requires_grad_(True)
    losses = llm.loss(embeds, batch.mask, batch.labels, objective)  # (B,)
    tokens = (batch.labels != -100).sum(dim=1).to(losses) if by_token else torch.ones_like(losses)  # (B,)
    (grad,) = torch.autograd.grad((losses * tokens).sum(), embeds)  # (B, T, d): row i belongs to sample i
    result: dict[str, Tensor] = {}
    for stream in edge.layers:
        layer = edge.layer(stream)
        theta = {name: parameter.detach() for name, parameter in layer.theta.items()}
        own = grad * batch.streams[stream].unsqueeze(-1)  # zero outside of the stream: no contribution

        def pulled(theta: dict[str, Tensor], x: Tensor, g: Tensor, layer: object = layer) -> Tensor:
            # x, g: (T, d)
            return (layer.functional(theta, x) * g).sum()  # type: ignore[attr-defined,no-any-return]

        grads = torch.func.vmap(torch.func.grad(pulled), in_dims=(None, 0, 0))(theta, batch.raw, own)
        result.update({f"{stream}.{leaf}": value for leaf, value in grads.items()})
    return result


def empirical_fisher(
    edge: NanoEdge,
    llm: LanguageModel,
    data: ClientData,
    indices: Sequence[int],
    *,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """Mean over the samples at ``indices`` of the squared per-sample gradients, shaped like the leaves."""
    total: dict[str, Tensor] = {}
    for start in range(0, len(indices), batch_size):
        part = per_sample_gradients(edge, llm, data, indices[start : start + batch_size])
        for name, gradients in part.items():
            squares = gradients.to(torch.float64).square().sum(dim=0)
            total[name] = total[name] + squares if name in total else squares
    return {name: (value / len(indices)).to(torch.float32) for name, value in total.items()}
