"""Gradient of a thin matrix together with its exact per-sample Fisher diagonal and per-sample norms, in one pass.

The gradient of sample i to a matrix ``(p, q)`` is ``G_i = X_iᵀ D_i``, with its inputs X_i ``(T, p)`` and the gradient
at its outputs D_i ``(T, q)``. Wanted are ``Σ G_i``, ``Σ G_i²`` (elementwise) and ``‖G_i‖``. Squaring the gradient of a
batch gives none of that: it is larger or smaller by the correlation of the samples. Forming all G_i costs ``N p q``
numbers. Here each G_i lives in registers only: memory is O(p q), and the reads are those of the plain gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import as_rows, check_activation, check_tensor, is_traced, require, runs_triton

__all__ = ["adapter_grad_fisher", "adapter_grad_fisher_reference", "nano_adapter_fisher"]


def adapter_grad_fisher_reference(x: Tensor, g: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch, with all per-sample gradients ``(N, p, q)`` in memory.

    Arguments and result as in ``adapter_grad_fisher``; float64 in gives float64 out.
    """
    each = torch.einsum("ntp,ntq->npq", x, g)
    each = (each if each.dtype == torch.float64 else each.float()) * scale
    return each.sum(0), each.square().sum(0), each.flatten(1).norm(dim=1)


def _run(x: Tensor, g: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(N T, p)`` and ``(N T, q)`` -> ``(p, q)``, ``(p, q)``, ``(N,)``."""
    p, q = x.shape[1], g.shape[1]
    samples = x.shape[0] // rows
    from . import _weight_grad_triton as wg

    grad = torch.empty(p, q, dtype=torch.float32, device=x.device)
    fisher = torch.empty_like(grad)
    norms = torch.empty(samples, dtype=torch.float32, device=x.device)
    # A program holds a slice of p for all of q: give it the longer side as p.
    if q > p:
        wg.gradients_by_sample(wg.Product(g, x, grad.T, scale), rows, fisher.T, norms)
    else:
        wg.gradients_by_sample(wg.Product(x, g, grad, scale), rows, fisher, norms)
    return grad, fisher, norms


@torch.library.custom_op("fednano::adapter_grad_fisher", mutates_args=())
def _op(x: Tensor, g: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return _run(x, g, rows, scale)


@_op.register_fake
def _(x: Tensor, g: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    grad = x.new_empty((x.shape[1], g.shape[1]), dtype=dtype)
    return grad, torch.empty_like(grad), x.new_empty(x.shape[0] // rows, dtype=dtype)


def adapter_grad_fisher(x: Tensor, g: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """``Σ G_i``, ``Σ G_i²`` and ``‖G_i‖`` for ``G_i = scale · x_iᵀ g_i``; not differentiable.

    Args:
        x: ``(N, T, p)`` inputs of the matrix, sample by sample; float32, bfloat16 or float16.
        g: ``(N, T, q)`` gradients at its outputs; dtype and device of x. Rows of padding must be 0 in g.
        scale: factor on every ``G_i``. If g comes from the mean of N losses, ``scale=N`` gives the gradients of the
            single losses; the mean Fisher is then ``fisher / N``.

    Returns:
        gradient ``(p, q)``, Fisher ``(p, q)`` and norms ``(N,)``, all float32.

    Raises:
        KernelArgumentError: device, dtype or shape do not fit, or a size is 0, or min(p, q) exceeds 256 on a GPU.
    """
    check_tensor("x", x, shape=(None, None, None))
    check_tensor("g", g, shape=(x.shape[0], x.shape[1], None), like=x)
    require(
        x.numel() >= 1 and g.numel() >= 1, f"x is {tuple(x.shape)}, g {tuple(g.shape)}; expected no size 0"
    )
    if not runs_triton(x):
        return adapter_grad_fisher_reference(x, g, scale)
    thin = min(x.shape[2], g.shape[2])
    require(
        thin <= 256,
        f"both sides of the gradient exceed 256 (p={x.shape[2]}, q={g.shape[2]}); one must be thin",
    )
    arguments = as_rows(x.detach()), as_rows(g.detach()), x.shape[1], float(scale)
    grad, fisher, norms = _op(*arguments) if is_traced(x) else _run(*arguments)
    return grad, fisher, norms


def nano_adapter_fisher(
    x: Tensor,
    dy: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    activation: str = "linear",
    gain: float = 1.0,
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Gradients, exact Fisher diagonals and norms of both matrices of ``nano_adapter``.

    Args:
        x: ``(N, T, d)`` what went into the adapter.
        dy: ``(N, T, d)`` the gradient at what came out.
        a: ``(d, r)``.
        b: ``(r, d)``.
        scale: s of the adapter.
        activation: ``"linear"`` or ``"gelu"``.
        gain: factor on every per-sample gradient (N undoes a mean over samples).

    Returns:
        ``{"a": (gradient (d, r), Fisher (d, r), norms (N,)), "b": (gradient (r, d), Fisher (r, d), norms (N,))}``,
        float32. The norm of a whole sample is ``hypot`` of the two.

    Raises:
        KernelArgumentError: as ``nano_adapter`` and ``adapter_grad_fisher``.
    """
    check_activation(activation)
    check_tensor("x", x, shape=(None, None, None))
    check_tensor("dy", dy, shape=tuple(x.shape), like=x)
    check_tensor("a", a, shape=(x.shape[2], None), like=x)
    check_tensor("b", b, shape=(a.shape[1], x.shape[2]), like=x)
    z = x @ a
    dz = dy @ b.T
    if activation == "gelu":
        dz = torch.ops.aten.gelu_backward(dz, z)
        z = F.gelu(z)
    return {"a": adapter_grad_fisher(x, dz, gain * scale), "b": adapter_grad_fisher(z, dy, gain * scale)}
