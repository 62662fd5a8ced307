"""FILA on a tuned adapter's own change, where a frozen LLM's federation keeps what it has learnt.

The change ``D`` of a stream's adapter is a product of rank k. Its row-weighted truncation ``B0 A0`` of rank r is the
part that the forget set leans on most; the rest ``D - B0 A0`` has rank ``k - r``. So the adapter's own leaves can hold
both, exactly: the first r of its k components are trained, the others keep their bits, and the unlearned adapter is an
adapter of the same kind and rank. Beside the adapter as it was, the change is the pair of rank 2r
``[B, -B0] [A; A0]`` (`change_pairs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fednano.adapters import LoRA, NanoAdapter
from fednano.errors import ConfigError
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.training.data import ClientData
from fednano.training.targets import without_end
from fednano.unlearning.fila import Pair, factorise_product

__all__ = ["Prepared", "bridge_fisher", "can_factorise", "change_pairs", "prepare"]


def can_factorise(edge: NanoEdge) -> bool:
    """Whether the change of every stream is a product of two leaves: linear NanoAdapters and LoRAs."""
    adapters = [edge.layer(stream).adapter for stream in edge.layers]
    return all(isinstance(a, LoRA) or (isinstance(a, NanoAdapter) and a.act == "linear") for a in adapters)


def bridge_fisher(
    edge: NanoEdge,
    llm: LanguageModel,
    data: ClientData,
    indices: Sequence[int],
    *,
    end: bool = True,
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """Diagonal Fisher of each stream's whole change ``D`` ``(d, d)``, exact and per sample.

    A bridge computes ``x + D x``, so the gradient in ``D`` of one sample is ``sum_t g_t x_t^T`` over its positions,
    with ``g`` the gradient in the embeddings, which a language host returns.

    Args:
        edge: NanoEdge with the adapters to look at.
        llm: the language model, here or on a host.
        data: one party's samples.
        indices: which of them; at least one.
        end: whether the answer's end token counts.
        batch_size: samples a call.

    Returns:
        Stream to ``(d, d)`` float64, rows by output.
    """
    width = edge.edge.hidden_size
    total = {stream: torch.zeros(width, width, dtype=torch.float64) for stream in edge.layers}
    for start in range(0, len(indices), batch_size):
        with torch.no_grad():
            batch = edge(*data.batch(indices[start : start + batch_size]))
        labels = batch.labels if end else without_end(batch.labels, edge.edge.tokenizer.eos_token_id)
        embeds = batch.embeds.detach().requires_grad_(True)
        tokens = (labels != -100).sum(dim=1)  # (B,)
        losses = llm.loss(embeds, batch.mask, labels, images=batch.images)
        (gradient,) = torch.autograd.grad((losses * tokens.to(losses)).sum(), embeds)  # (B, T, d)
        for stream in total:
            for row, g, x in zip(batch.streams[stream], gradient, batch.raw, strict=True):
                if bool(row.any()):
                    total[stream] += (g[row].T @ x[row]).square().double().cpu()
    return {stream: value / len(indices) for stream, value in total.items()}


@dataclass(frozen=True)
class Prepared:
    """An adapter rewritten for unlearning; it computes what it computed before.

    Attributes:
        leaves: ``"<stream>.<leaf>"`` to tensors of the adapter's own shapes.
        moving: leaf to a boolean tensor of its shape: what is trained; the rest keeps its bits.
        ranks: stream to r, the number of trained components; streams whose change is zero are left out.
        error: largest absolute difference of a change's entries to what it was, from rounding.
    """

    leaves: dict[str, Tensor]
    moving: dict[str, Tensor]
    ranks: dict[str, int]
    error: float


def prepare(edge: NanoEdge, rows: Mapping[str, Tensor], rank: int) -> Prepared:
    """Rewrite the adapters of ``edge`` so that their first components are what is to be unlearned.

    Args:
        edge: NanoEdge with the tuned adapters; it is not changed.
        rows: stream to row weights ``(d,)``, from `fednano.unlearning.fila.row_weights`.
        rank: r; a stream whose adapter has a lower rank uses all of it.

    Raises:
        ConfigError: an adapter is no product of two leaves, or ``rank`` is below 1.
    """
    if rank < 1:
        raise ConfigError(f"FILA got rank {rank}; expected at least 1.")
    if not can_factorise(edge):
        raise ConfigError(
            "FILA needs adapters whose change is a product of two factors, such as a linear 'nano' or 'lora'; this "
            f"run has {edge.spec()}. Use the method 'ihl', which needs none."
        )
    leaves = edge.travelling()
    moving = {name: torch.ones_like(leaf, dtype=torch.bool) for name, leaf in leaves.items()}
    ranks: dict[str, int] = {}
    error = 0.0
    for stream in edge.layers:
        left, right = _factors(edge, stream, leaves)
        if not (bool(left.any()) and bool(right.any())):
            continue  # this stream has learnt nothing; a factorisation of zero could not be trained
        size = left.shape[1]
        ranks[stream] = min(rank, size)
        first, rest = factorise_product(left, right, rows[stream], ranks[stream])
        new_left, new_right = torch.cat([first.B, rest.B], dim=1), torch.cat([first.A, rest.A])
        own = _as_leaves(edge, stream, new_left, new_right)
        inside = torch.arange(size) < ranks[stream]
        trained = _as_leaves(edge, stream, inside.expand_as(new_left), inside[:, None].expand_as(new_right))
        for name, leaf in own.items():
            leaves[name] = leaf.to(leaves[name])
            moving[name] = trained[name].to(leaves[name].device)
        again, other = _factors(edge, stream, leaves)
        scale = abs(_scale(edge, stream))
        error = max(error, scale * float((again @ other - left @ right).abs().max()))
    return Prepared(leaves, moving, ranks, error)


def change_pairs(edge: NanoEdge, prepared: Prepared, after: Mapping[str, Tensor]) -> dict[str, Pair]:
    """What unlearning changed, as the pair of rank 2r beside the adapter as it was.

    Args:
        edge: NanoEdge of the run; only its adapters' kind is looked at.
        prepared: from `prepare`.
        after: leaves after unlearning.

    Returns:
        Stream to factors with ``D_after = D_before + B A``: ``B = [B, -B0]``, ``A = [A; A0]``, float32.
    """
    pairs = {}
    for stream, rank in prepared.ranks.items():
        old_left, old_right = _factors(edge, stream, prepared.leaves)
        new_left, new_right = _factors(edge, stream, after)
        scale = _scale(edge, stream)
        pairs[stream] = Pair(
            torch.cat([new_right[:rank], old_right[:rank]]).float(),
            (scale * torch.cat([new_left[:, :rank], -old_left[:, :rank]], dim=1)).float(),
        )
    return pairs


def _scale(edge: NanoEdge, stream: str) -> float:
    adapter = edge.layer(stream).adapter
    assert isinstance(adapter, NanoAdapter | LoRA)
    return adapter.scale


def _factors(edge: NanoEdge, stream: str, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``left (d_out, k)`` and ``right (k, d_in)`` in float64: the change is the scale times their product."""
    A, B = (leaves[f"{stream}.{name}"].detach().double().cpu() for name in "AB")
    # A NanoAdapter multiplies rows from the right: A (d_in, k), B (k, d_out).
    return (B.T, A.T) if isinstance(edge.layer(stream).adapter, NanoAdapter) else (B, A)


def _as_leaves(edge: NanoEdge, stream: str, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The inverse of `_factors`."""
    if isinstance(edge.layer(stream).adapter, NanoAdapter):
        left, right = right.T, left.T
        return {f"{stream}.A": left.contiguous(), f"{stream}.B": right.contiguous()}
    return {f"{stream}.A": right.contiguous(), f"{stream}.B": left.contiguous()}
