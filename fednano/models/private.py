"""A step whose loss is somebody else's: hidden states of the answers out, their gradients in.

The head and the labels stay with the one who asks. Between the two halves the graph is kept if there is room for it;
if it is let go of, the way back computes the way there once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fednano.models.images import Images
from fednano.models.layout import lay_out
from fednano.models.memory import Part
from fednano.models.passes import Passes

__all__ = ["HiddenStep"]


class HiddenStep:
    """Hidden states of some positions of a batch, and the way back from them.

    Args:
        passes: over the model.
        embeds: ``(B, T, d)`` on the model's device.
        mask: ``(B, T)`` on the CPU.
        labelled: ``(B, T)`` long on the CPU: 0 where a label is to be predicted, -100 elsewhere.
        images: of each sample.

    Attributes:
        replayed: how often the way there was computed again.
    """

    def __init__(
        self, passes: Passes, embeds: Tensor, mask: Tensor, labelled: Tensor, images: Images = ()
    ) -> None:
        self._passes, self._embeds, self._mask, self._labelled = passes, embeds.detach(), mask, labelled
        self._images = images
        self._graph: tuple[Tensor, Tensor] | None = None
        self.replayed = 0

    def states(self, *, keep: bool) -> Tensor:
        """Hidden states ``(N, d)`` from which the N labels are predicted, without a graph of the caller's.

        Args:
            keep: hold on to the graph, if the batch fits into memory at once.
        """
        parts = self._passes.parts(self._mask.sum(1).tolist())
        if keep and len(parts) == 1 and not parts[0].checkpoints:
            self._graph = self._forward(parts[0], True)
            return self._graph[1].detach()
        return torch.cat([self._forward(part, False)[1] for part in parts])

    def backward(self, gradient: Tensor) -> Tensor:
        """Gradient ``(B, T, d)`` in the embeddings from that ``(N, d)`` in the hidden states."""
        graph, self._graph = self._graph, None
        if graph is not None:
            return torch.autograd.grad(graph[1], graph[0], gradient.to(graph[1]))[0]
        self.replayed += 1
        found, at = [], 0
        for part in self._passes.parts(self._mask.sum(1).tolist()):
            rows, hidden = self._forward(part, True)
            own = gradient[at : at + len(hidden)].to(hidden)
            at += len(hidden)
            found.append(torch.autograd.grad(hidden, rows, own)[0])
        return torch.cat(found)

    @property
    def kept(self) -> bool:
        """Whether the graph of the way there is still there."""
        return self._graph is not None

    def forget(self) -> None:
        """Let go of the graph; the step can still be finished."""
        self._graph = None

    def _forward(self, part: Part, graph: bool) -> tuple[Tensor, Tensor]:
        layout = lay_out(self._mask[part.rows], self._labelled[part.rows], self._images[part.rows])
        rows = self._embeds[part.rows].detach().requires_grad_(graph)
        with torch.set_grad_enabled(graph):
            return rows, self._passes.states(rows, layout, part.checkpoints)
