"""The optimiser's steps of a client's local training.

Adapters are a few small leaves, and a step of AdamW with FedProx's term is a dozen launches for each of them. Where the
project's kernels are in use (see :mod:`fednano.adapters.fused`), all leaves lie in one buffer while a round lasts, and
`fednano_kernels.flat_adamw_` makes the whole step, proximal term included, in one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn

from fednano.adapters.fused import kernels_for

__all__ = ["OPTIMIZERS", "Steps", "optimizer_steps"]

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


class Steps(Protocol):
    """What a training loop asks for between two batches."""

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...

    def gradients(self) -> Sequence[Tensor]:
        """All gradients, as few tensors as there are; a leaf that the loss does not reach has zeros."""
        ...

    def step(self) -> None:
        """Add the proximal term, clip, and move the leaves."""
        ...


@contextmanager
def optimizer_steps(
    parameters: Sequence[nn.Parameter],
    optimizer: str,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    proximal_mu: float = 0.0,
    clip_norm: float = 0.0,
) -> Iterator[Steps]:
    """Steps of an optimiser with fresh state over ``parameters``, in whose tensors the result is found afterwards.

    Args:
        parameters: trained leaves.
        optimizer: a name in `OPTIMIZERS`.
        learning_rate: step size.
        weight_decay: passed to the optimiser.
        proximal_mu: weight of ``mu/2 |theta - theta_0|^2`` (arXiv:1812.06127), with theta_0 the leaves as they are now.
        clip_norm: largest norm of the gradient, proximal term included; 0 switches clipping off.
    """
    kernels = _kernels_for(parameters, optimizer, weight_decay)
    if kernels is None:
        made = OPTIMIZERS[optimizer](parameters, lr=learning_rate, weight_decay=weight_decay)
        yield _TorchSteps(parameters, made, proximal_mu, clip_norm)
        return
    flat = _FlatSteps(kernels, parameters, learning_rate, weight_decay, proximal_mu, clip_norm)
    try:
        yield flat
    finally:
        flat.scatter()


def _kernels_for(
    parameters: Sequence[nn.Parameter], optimizer: str, weight_decay: float
) -> ModuleType | None:
    """The kernels, where they compute the same step: Adam's decay is not AdamW's, and one buffer has one dtype."""
    same = optimizer == "adamw" or (optimizer == "adam" and weight_decay == 0)
    alike = {(parameter.dtype, parameter.device) for parameter in parameters}
    if not same or len(alike) != 1 or any(parameter.numel() == 0 for parameter in parameters):
        return None
    return kernels_for(parameters[0])


class _TorchSteps:
    """An optimiser of torch's."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        proximal_mu: float,
        clip_norm: float,
    ) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._mu, self._clip = proximal_mu, clip_norm
        self._anchor = [parameter.detach().clone() for parameter in parameters] if proximal_mu else []

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> Sequence[Tensor]:
        found = []
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
        return found

    def step(self) -> None:
        gradients = self.gradients()
        if self._mu:
            for gradient, parameter, origin in zip(gradients, self._parameters, self._anchor, strict=True):
                gradient.add_(parameter.detach() - origin, alpha=self._mu)
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()


class _FlatSteps:
    """AdamW over one buffer of which the leaves are parts."""

    def __init__(
        self,
        kernels: ModuleType,
        parameters: Sequence[nn.Parameter],
        learning_rate: float,
        weight_decay: float,
        proximal_mu: float,
        clip_norm: float,
    ) -> None:
        self._kernels, self._parameters = kernels, parameters
        self._rate, self._decay, self._mu, self._clip = learning_rate, weight_decay, proximal_mu, clip_norm
        self._flat = torch.cat([parameter.detach().flatten() for parameter in parameters])  # (n,)
        self._gradient = torch.zeros_like(self._flat)  # (n,)
        self._moments = [torch.zeros_like(self._flat, dtype=torch.float32) for _ in range(2)]
        self._anchor = self._flat.clone() if proximal_mu else None
        self._count = 0
        sizes = [parameter.numel() for parameter in parameters]
        leaves, gradients = torch.split(self._flat, sizes), torch.split(self._gradient, sizes)
        for parameter, leaf, gradient in zip(parameters, leaves, gradients, strict=True):
            parameter.data = leaf.view(parameter.shape)
            parameter.grad = gradient.view(parameter.shape)  # which the backward pass adds to

    def zero_grad(self) -> None:
        self._gradient.zero_()

    def gradients(self) -> Sequence[Tensor]:
        return [self._gradient]

    def step(self) -> None:
        self._count += 1
        mu = self._mu
        if self._clip:
            if mu:
                assert self._anchor is not None
                self._gradient.add_(self._flat - self._anchor, alpha=mu)
                mu = 0.0  # it is in the gradient now, where the norm counts it
            norm = torch.linalg.vector_norm(self._gradient)
            self._gradient.mul_((self._clip / (norm + 1e-6)).clamp(max=1.0))
        self._kernels.flat_adamw_(
            *(self._flat, self._gradient, *self._moments, self._count),
            lr=self._rate,
            weight_decay=self._decay,
            anchor=self._anchor if mu else None,
            mu=mu,
        )

    def scatter(self) -> None:
        """Give each leaf memory of its own again, so that nobody who keeps one keeps the buffer."""
        for parameter in self._parameters:
            parameter.data = parameter.detach().clone()
            parameter.grad = None
