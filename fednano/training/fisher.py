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

from fednano.adapters import AdapterLayer
from fednano.adapters.fused import kernels_for
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
    raw, pulls = _pulls(edge, llm, data, indices, objective, by_token)
    return {
        f"{stream}.{leaf}": value
        for stream, pull in pulls.items()
        for leaf, value in _each(edge.layer(stream), raw, pull).items()
    }


def empirical_fisher(
    edge: NanoEdge,
    llm: LanguageModel,
    data: ClientData,
    indices: Sequence[int],
    *,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """Mean over the samples at ``indices`` of the squared per-sample gradients, shaped like the leaves.

    Low-rank adapters take their Fisher from one kernel where the project's kernels are in use (on a GPU): the squares
    are summed where the gradients are made, and no sample's gradient is ever in memory.
    """
    total: dict[str, Tensor] = {}
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        raw, pulls = _pulls(edge, llm, data, chosen, "cross_entropy", True)
        for stream, pull in pulls.items():
            layer = edge.layer(stream)
            squares = _fused_squares(layer, raw, pull)
            if squares is None:
                each = _each(layer, raw, pull)
                squares = {leaf: value.to(torch.float64).square().sum(dim=0) for leaf, value in each.items()}
            for leaf, value in squares.items():
                name = f"{stream}.{leaf}"
                total[name] = total[name] + value if name in total else value
    return {name: (value / len(indices)).to(torch.float32) for name, value in total.items()}


def _pulls(
    edge: NanoEdge,
    llm: LanguageModel,
    data: ClientData,
    indices: Sequence[int],
    objective: str,
    by_token: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What goes into the adapters ``(B, T, d)``, and for each stream the gradient at what comes out of its adapter,
    sample by sample ``(B, T, d)``, zero outside of the stream."""
    prompts, features = data.batch(indices)
    with torch.no_grad():
        batch = edge(prompts, features)
    embeds = batch.embeds.detach().requires_grad_(True)
    losses = llm.loss(embeds, batch.mask, batch.labels, objective, batch.images)  # (B,)
    tokens = (batch.labels != -100).sum(dim=1).to(losses) if by_token else torch.ones_like(losses)  # (B,)
    (grad,) = torch.autograd.grad((losses * tokens).sum(), embeds)  # (B, T, d): row i belongs to sample i
    return batch.raw, {stream: grad * batch.streams[stream].unsqueeze(-1) for stream in edge.layers}


def _each(layer: AdapterLayer, raw: Tensor, pull: Tensor) -> dict[str, Tensor]:
    """Each sample's gradient of every leaf, ``(B, *leaf)``, for inputs and output gradients ``(B, T, d)``."""
    theta = {name: parameter.detach() for name, parameter in layer.theta.items()}

    def pulled(theta: dict[str, Tensor], x: Tensor, g: Tensor) -> Tensor:
        # x, g: (T, d)
        return (layer.functional(theta, x) * g).sum()

    found: dict[str, Tensor] = torch.func.vmap(torch.func.grad(pulled), in_dims=(None, 0, 0))(
        theta, raw, pull
    )
    return found


def _fused_squares(layer: AdapterLayer, raw: Tensor, pull: Tensor) -> dict[str, Tensor] | None:
    """The sum over samples of squared gradients of every leaf, by one kernel; None where there is none for the layer.

    There is one for ``x + s act(x A) B`` if the layer's leaves are A and B, or one of them.
    """
    kernels, form = kernels_for(raw), layer.low_rank_form()
    if kernels is None or form is None or form.mix is not None:
        return None
    where: dict[
        str, tuple[str, bool]
    ] = {}  # leaf to the factor that it is, and whether it lies as the form has it
    for name, leaf in layer.theta.items():
        side = next((side for side in "ab" if getattr(form, side).data_ptr() == leaf.data_ptr()), None)
        factor = leaf if side is None else getattr(form, side)
        if side is None or factor.numel() != leaf.numel():
            return None
        where[name] = side, factor.shape == leaf.shape and factor.stride() == leaf.stride()
    a, b = form.a.detach().T.contiguous().to(raw.dtype), form.b.detach().T.contiguous().to(raw.dtype)
    found = kernels.nano_adapter_fisher(raw, pull.to(raw.dtype), a, b, form.scale, form.activation)
    # The form's A is (r, d) and its B (d, r); the kernel's are transposed.
    return {
        name: (found[side][1].T if straight else found[side][1]).to(torch.float64)
        for name, (side, straight) in where.items()
    }
