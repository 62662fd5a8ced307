"""Token losses over a frozen head: hidden states in, one loss a row out, and the gradient to the hidden states.

With logits ``z = W h``, ``p = softmax(z)``, the label t and its strongest rival ``j = argmax_{v≠t} p_v``, four losses
have one gradient, ``dz = a·p + b·e_t + c·e_j`` with scalars per row:

=================  ======================================  ============  ==========  ======
objective          loss of a row                           a             b           c
=================  ======================================  ============  ==========  ======
cross_entropy      −log p_t                                1             −1          0
gradient_ascent    log p_t                                 −1            1           0
inverted_hinge     1 + p_t − p_j (LoKU)                    p_j − p_t     p_t         −p_j
npo                (2/β) log(1 + (p_t / π_ref)^β)          −w            w           0
=================  ======================================  ============  ==========  ======

with ``w = 2σ(β(log p_t − log π_ref))``: negative preference optimisation, a token at a time. For its sequence form, sum
the rows of ``gradient_ascent`` and apply the soft-plus outside: rows are differentiable one by one.

The rows are taken in chunks: cuBLAS forms the chunk's logits, one kernel reads them, writes the losses and puts dz in
their place, and cuBLAS multiplies back. So the logits of all rows never exist at once. Rows with label −100 are dropped
before the first product. The gradient is formed in the forward, for upstream gradient 1, because the logits are at hand
there; the backward only scales its rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import FLOATS, check_tensor, is_traced, require, runs_triton

__all__ = ["OBJECTIVES", "linear_token_loss", "linear_token_loss_reference"]

OBJECTIVES = ("cross_entropy", "gradient_ascent", "inverted_hinge", "npo")
IGNORE = -100
# Rows of one chunk: enough to fill the card in both products, while the logits stay a fraction of the activations.
CHUNK_ROWS = 2048


def _loss_of_logits(
    logits: Tensor, labels: Tensor, objective: str, reference: Tensor | None, beta: float
) -> Tensor:
    """``(N, V)`` float, ``(N,)`` labels in range -> ``(N,)``, by autograd-friendly torch."""
    target = labels[:, None]
    if objective == "inverted_hinge":
        p = logits.softmax(-1)
        rival = p.scatter(1, target, -1.0).amax(-1)
        return 1 + p.gather(1, target)[:, 0] - rival
    log_p = logits.log_softmax(-1).gather(1, target)[:, 0]
    if objective == "cross_entropy":
        return -log_p
    if objective == "gradient_ascent":
        return log_p
    if reference is None:
        raise AssertionError("checked before")
    return 2 / beta * F.softplus(beta * (log_p - reference.to(log_p.dtype)))


def linear_token_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: str = "cross_entropy",
    *,
    reference: Tensor | None = None,
    beta: float = 0.1,
) -> Tensor:
    """The same in plain torch: logits in the dtype of ``hidden``, the rest in float32 (or float64).

    Arguments and result as in ``linear_token_loss``.
    """
    keep = labels != IGNORE
    logits = hidden[keep] @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    kept_reference = None if reference is None else reference[keep]
    rows = _loss_of_logits(logits, labels[keep], objective, kept_reference, beta)
    return torch.zeros(labels.shape, dtype=rows.dtype, device=rows.device).masked_scatter(keep, rows)


def _order(labels: Tensor, count: int) -> Tensor:
    """Indices ``(count,)`` of the labelled rows, in order, without waiting for the device."""
    return torch.argsort((labels == IGNORE).to(torch.uint8), stable=True)[:count]


def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, reference: Tensor | None, objective: str, beta: float,
    count: int, chunk: int, need_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses ``(M,)`` float32 and, for upstream gradient 1, the gradient ``(M, d)`` (empty if not needed)."""
    from . import _token_loss_triton as tt

    M, d = hidden.shape
    compact = count < M
    losses = torch.zeros(M, dtype=torch.float32, device=hidden.device)
    d_hidden = (
        hidden.new_zeros(M, d) if compact and need_grad else hidden.new_empty((M, d) if need_grad else 0)
    )
    if count == 0:
        return losses, d_hidden
    order = _order(labels, count) if compact else None
    chunk = min(chunk, count)
    buffer = hidden.new_empty(chunk, weight.shape[0])
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        rows = slice(start, stop) if order is None else order[start:stop]
        h = hidden[rows]
        logits = buffer[: stop - start]
        torch.mm(h, weight.T, out=logits)
        chunk_losses = tt.losses_and_gradients(
            logits, labels[rows], None if reference is None else reference[rows], objective, beta, need_grad
        )
        if order is None:
            losses[rows] = chunk_losses
            if need_grad:
                torch.mm(logits, weight, out=d_hidden[start:stop])
        else:
            losses.index_copy_(0, order[start:stop], chunk_losses)
            if need_grad:
                d_hidden.index_copy_(0, order[start:stop], logits @ weight)
    return losses, d_hidden


@torch.library.custom_op("fednano::linear_token_loss", mutates_args=())
def _forward_op(
    hidden: Tensor, weight: Tensor, labels: Tensor, reference: Tensor | None, objective: str, beta: float,
    count: int, chunk: int, need_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(hidden, weight, labels, reference, objective, beta, count, chunk, need_grad)


@_forward_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, reference: Tensor | None, objective: str, beta: float,
    count: int, chunk: int, need_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        hidden.new_empty(hidden.shape if need_grad else (0,)),
    )


def _scaled(grad: Tensor, d_hidden: Tensor) -> Tensor:
    """Scale the rows ``(M, d)`` of the unit gradient by ``(M,)``."""
    # Not `d_hidden * grad[:, None]`: that would be float32, twice the memory.
    return torch.mul(d_hidden, grad[:, None], out=torch.empty_like(d_hidden))


@torch.library.custom_op("fednano::linear_token_loss_backward", mutates_args=())
def _backward_op(grad: Tensor, d_hidden: Tensor) -> Tensor:
    return _scaled(grad, d_hidden)


@_backward_op.register_fake
def _(grad: Tensor, d_hidden: Tensor) -> Tensor:
    return torch.empty_like(d_hidden)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.need_grad = inputs[8]


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0] or not ctx.need_grad:
        return (None,) * 9
    (d_hidden,) = ctx.saved_tensors
    return (_backward_op(grad, d_hidden), *(None,) * 8)


_forward_op.register_autograd(_backward, setup_context=_setup)


class _Function(torch.autograd.Function):
    """The same pair without the dispatcher's overhead, for plain eager calls."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, reference: Tensor | None, objective: str,
        beta: float, count: int, chunk: int,
    ) -> Tensor:  # fmt: skip
        need_grad = ctx.needs_input_grad[0]
        losses, d_hidden = _forward(
            hidden, weight, labels, reference, objective, beta, count, chunk, need_grad
        )
        ctx.save_for_backward(d_hidden)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden,) = ctx.saved_tensors
        return (_scaled(grads[0], d_hidden), *(None,) * 7)


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, objective: str, reference: Tensor | None, beta: float
) -> None:
    check_tensor("hidden", hidden, shape=(None, None))
    require(hidden.dtype in FLOATS or hidden.dtype == torch.float64, f"hidden is {hidden.dtype}")
    check_tensor("weight", weight, shape=(None, hidden.shape[1]), like=hidden)
    require(not weight.requires_grad, "weight requires a gradient; this operator is for a frozen head")
    require(hidden.shape[0] >= 1, "hidden has no rows; expected at least one")
    require(weight.shape[0] >= 2, f"weight has {weight.shape[0]} rows; expected a vocabulary of at least 2")
    require(
        labels.shape == hidden.shape[:1] and labels.dtype == torch.int64 and labels.device == hidden.device,
        f"labels are {labels.dtype} {tuple(labels.shape)} on {labels.device}; "
        f"expected int64 ({hidden.shape[0]},) on {hidden.device}",
    )
    require(objective in OBJECTIVES, f"objective is {objective!r}; expected one of {OBJECTIVES}")
    if objective == "npo":
        require(
            reference is not None, "npo needs reference, the log-probabilities (M,) of the reference model"
        )
        require(beta > 0, f"beta is {beta}; expected a positive number")
    else:
        require(reference is None, f"{objective} takes no reference; it is for npo")
    if reference is not None:
        require(
            reference.shape == labels.shape and reference.device == labels.device,
            f"reference is {tuple(reference.shape)} on {reference.device}; "
            f"expected {tuple(labels.shape)} on {labels.device}",
        )


def _count(labels: Tensor, vocabulary: int) -> int:
    """Number of labelled rows; one wait for the device.

    Raises:
        KernelArgumentError: a label is neither −100 nor in ``[0, vocabulary)``.
    """
    keep = labels != IGNORE
    wrong = keep & ((labels < 0) | (labels >= vocabulary))
    count, bad = torch.stack((keep.sum(), wrong.sum())).tolist()
    if bad:
        value = int(labels[wrong][0])
        require(
            False, f"{bad} labels out of range, such as {value}; expected {IGNORE} or 0..{vocabulary - 1}"
        )
    return int(count)


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: str = "cross_entropy",
    *,
    reference: Tensor | None = None,
    beta: float = 0.1,
    labelled_rows: int | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """One loss a row, over a frozen head, without ever holding all logits; differentiable once in ``hidden``.

    Args:
        hidden: ``(M, d)``, float32, bfloat16 or float16; row m predicts ``labels[m]``.
        weight: ``(V, d)``, the head, same dtype and device, no gradient.
        labels: ``(M,)`` int64 in ``[0, V)``, or −100 for a row without loss, which costs nothing.
        objective: one of ``OBJECTIVES``.
        reference: ``(M,)`` log-probabilities of the reference model at the labels, for ``npo`` only.
        beta: temperature of ``npo``.
        labelled_rows: how many labels are not −100. Not given, labels are checked and counted, which waits for the
            device once. Given (a data loader knows it), nothing waits and the call can be captured in a CUDA graph;
            a label out of range then gives loss 0, as −100 does, and nothing is read out of bounds.
        chunk_rows: rows of one chunk; the peak of extra memory is ``chunk_rows · V`` elements and O(M d).

    Returns:
        ``(M,)`` float32 (float64 for float64 inputs); rows with label −100 are 0.

    Raises:
        KernelArgumentError: device, dtype or shape do not fit, a label is out of range, or an option is unknown.
    """
    _check(hidden, weight, labels, objective, reference, beta)
    require(chunk_rows >= 1, f"chunk_rows is {chunk_rows}; expected at least 1")
    count = _count(labels, weight.shape[0]) if labelled_rows is None else labelled_rows
    require(0 <= count <= labels.shape[0], f"labelled_rows is {count}; expected 0..{labels.shape[0]}")
    if not runs_triton(hidden):
        return linear_token_loss_reference(hidden, weight, labels, objective, reference=reference, beta=beta)
    arguments = (hidden, weight, labels, reference, objective, float(beta), count, chunk_rows)
    if is_traced(hidden):
        losses = _forward_op(*arguments, torch.is_grad_enabled() and hidden.requires_grad)[0]
    else:
        losses = _Function.apply(*arguments)  # type: ignore[no-untyped-call]
    result: Tensor = losses
    return result
