"""Forward and backward passes over the frozen language part: the arithmetic of a step, and nothing else.

Activations belong to a part of a batch that fits into memory (`fednano.models.memory`), logits to tokens that carry a
label. With mask and labels on the CPU nothing here waits for the device, so that a GPU is told what comes next while it
still computes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fednano.adapters.fused import kernels_for
from fednano.errors import ConfigError
from fednano.models.blocks import Blocks
from fednano.models.cuda_graphs import CudaGraphs, Decode
from fednano.models.cuda_pool import CudaPool
from fednano.models.images import Images, ImageUse, decoder_inputs
from fednano.models.layout import Layout, lay_out
from fednano.models.masks import plain_rows
from fednano.models.memory import Cost, Memory, Part, PipelineMemory, plan, smaller

if TYPE_CHECKING:
    from fednano.models.language import LanguagePart

__all__ = ["Passes", "sample_losses"]

log = logging.getLogger(__name__)

_WARM_TOKENS = 512


class Passes:
    """Passes over one language part, whose weights are frozen.

    Args:
        part: the language part, on its device.
        compiled: compile the decoder's blocks with ``torch.compile``.
        memory: what is known of the device's memory; ``None`` asks CUDA, and plans nothing elsewhere.
        graphs: record passes of sizes that come often as CUDA graphs (`fednano.models.cuda_graphs`).

    Raises:
        ConfigError: graphs of a model that does not lie on one GPU.

    Attributes:
        turn: held while the decoder runs, where its own buffers change during a pass.
        graphs: the recorded passes; ``None`` without.
    """

    def __init__(
        self,
        part: LanguagePart,
        *,
        compiled: bool = False,
        memory: Memory | None = None,
        graphs: bool = False,
    ) -> None:
        weight = next(part.decoder.parameters())
        self._part, self.device, self.dtype = part, weight.device, weight.dtype
        self._head_device = next(part.head.parameters()).device
        if memory is None and self.device.type == "cuda":
            memory = PipelineMemory(part.devices)
        self._memory = memory
        self._cost: Cost | None = None
        self._blocks = Blocks(part.decoder, compiled=compiled)
        # Rotary embeddings of these kinds rewrite their own buffers during a forward pass.
        kinds = [str(getattr(m, "rope_type", "")) for m in part.decoder.modules()]
        stateful = any("dynamic" in kind or "longrope" in kind for kind in kinds)
        self.turn: AbstractContextManager[Any] = threading.Lock() if stateful else nullcontext()
        self.graphs: CudaGraphs | None = None
        if graphs:
            if part.devices != [self.device] or self.device.type != "cuda":
                where = ", ".join(map(str, part.devices))
                raise ConfigError(f"CUDA graphs need a model on one GPU; this one lies on {where}")
            if stateful:
                log.warning("no CUDA graphs: this decoder's rotary embedding changes during a pass")
            else:
                self.graphs = CudaGraphs(
                    self._decode, part.hidden_size, self.dtype, self.device, part.max_positions, CudaPool
                )

    def compute(
        self,
        embeds: Tensor,
        mask: Tensor,
        labels: Tensor,
        objective: str,
        want_gradient: bool,
        images: Images = (),
        launched: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Tensor | None]:
        """Losses ``(B,)`` and, if wanted, the gradient ``(B, T, d)`` of their sum, outside of any graph.

        Args:
            embeds: ``(B, T, d)`` float, as all inputs found acceptable before (`LocalLLM.check`).
            mask: ``(B, T)``.
            labels: ``(B, T)`` int64.
            objective: name of the token loss.
            want_gradient: whether to go backward.
            images: of each sample.
            launched: called when the device has been told the way there, which takes the interpreter; may come again.

        Raises:
            MemoryError, torch.OutOfMemoryError: one sample alone does not fit into the memory there is.
        """
        mask, labels = mask.detach().cpu().bool(), labels.detach().cpu()
        lengths = mask.sum(1).tolist()
        parts = self._parts_of(lengths)
        batch = embeds, mask, labels, objective, want_gradient, images, launched
        while (done := self._try(parts, *batch)) is None:
            # The plan was wrong, or others took the memory meanwhile.
            if self._let_go():
                continue
            parts = smaller(parts, len(lengths), len(self._blocks))
            if not parts:
                raise torch.OutOfMemoryError("a sample does not fit into the memory that is free now")
        if len(done) == 1:
            return done[0]
        gradients = [gradient for _, gradient in done if gradient is not None]
        return torch.cat([losses for losses, _ in done]), torch.cat(gradients) if gradients else None

    def _try(self, parts: list[Part], *batch: Any) -> list[tuple[Tensor, Tensor | None]] | None:
        """The parts one after the other, or ``None``, with all they took let go, if memory ran out."""
        try:
            return [self._one(part, *batch) for part in parts]
        except torch.OutOfMemoryError:
            return None

    def first(self) -> None:
        """Run a short pass, so that the first request does not pay for what torch sets up then."""
        tokens = min(2, self._part.max_positions)
        embeds = torch.zeros(1, tokens, self._part.hidden_size, device=self.device, dtype=self.dtype)
        labels = torch.zeros(1, tokens, dtype=torch.int64)
        self._one(Part(slice(0, 1)), embeds, labels == 0, labels, "cross_entropy", True)

    def warm_up(self) -> None:
        """Run the first passes, which load kernels and compile, and measure what a token takes on a GPU.

        Raises:
            ConfigError: graphs were asked for, and this decoder cannot be recorded.
        """
        tokens = min(_WARM_TOKENS, self._part.max_positions)

        def run(samples: int, length: int, checkpoints: int = 0) -> tuple[int, int]:
            embeds = torch.randn(samples, length, self._part.hidden_size, device=self.device).to(self.dtype)
            mask = torch.ones(samples, length, dtype=torch.bool)
            labels = torch.zeros(samples, length, dtype=torch.int64)
            for _ in range(2):  # the first may compile, and take more
                if self._memory is not None:
                    self._memory.start()
                part = Part(slice(0, samples), checkpoints)
                self._one(part, embeds, mask, labels, "cross_entropy", True)
            return samples * length, 0 if self._memory is None else self._memory.taken()

        single = run(1, max(tokens // 2, 2))
        if self._memory is None:
            return
        double = run(2, tokens)
        kept = run(2, tokens, len(self._blocks)) if len(self._blocks) else double
        self._cost = Cost.fit(single, double, kept)
        if self.graphs is not None:
            self.graphs.first()

    def parts(self, lengths: list[int]) -> list[Part]:
        """How to cut a batch."""
        if self._memory is None or self._cost is None:
            return [Part(slice(0, len(lengths)))]
        try:
            parts = self._planned(lengths, self._cost)
        except MemoryError:
            if not self._let_go():
                raise
            return self._planned(lengths, self._cost)
        if len(parts) > 1 and self._let_go():
            return self._planned(lengths, self._cost)
        return parts

    def _planned(self, lengths: list[int], cost: Cost) -> list[Part]:
        return plan(lengths, cost, self._free(), len(self._blocks))

    def _let_go(self) -> bool:
        """Give the memory of recorded passes back; whether there was any."""
        return self.graphs is not None and self.graphs.let_go()

    def _parts_of(self, lengths: list[int]) -> list[Part]:
        """How to cut a batch of which a whole pass may be recorded."""
        if self.graphs is not None and self.graphs.has(len(lengths), max(lengths)):
            return [Part(slice(0, len(lengths)))]
        return self.parts(lengths)

    def _free(self) -> int:
        """Bytes that a pass may take now, beside what recorded ones hold."""
        assert self._memory is not None
        return self._memory.free() - (0 if self.graphs is None else self.graphs.held)

    def _needed(self, tokens: int) -> int:
        """Bytes that a pass over so many tokens takes."""
        return 0 if self._cost is None else int(self._cost.fixed + self._cost.per_token * tokens)

    def _decoder_for(
        self, layout: Layout, samples: int, checkpoints: int
    ) -> AbstractContextManager[Decode | None]:
        """What stands for the decoder in a pass of its own; see `CudaGraphs.decoder`."""
        plain = self._part.image_use is ImageUse.PLAIN or not any(map(len, layout.images))
        if self.graphs is None or self._memory is None or checkpoints or not plain:
            return nullcontext()
        return self.graphs.decoder(samples, layout.longest, self._needed, self._free)

    def _decode(self, x: Tensor, images: Images = ()) -> Tensor:
        """Hidden states ``(B, L, d)`` of embeddings ``(B, L, d)``."""
        where = decoder_inputs(self._part.image_use, self._part.image_masks, x, images)
        with plain_rows():
            states: Tensor = self._part.decoder(inputs_embeds=x, use_cache=False, **where).last_hidden_state
        return states

    def _one(
        self,
        part: Part,
        embeds: Tensor,
        mask: Tensor,
        labels: Tensor,
        objective: str,
        want_gradient: bool,
        images: Images = (),
        launched: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Tensor | None]:
        """Losses and gradient of some of a batch's samples, outside of any graph."""
        layout = lay_out(mask[part.rows], labels[part.rows], images[part.rows])
        rows = embeds.detach()[part.rows].requires_grad_(want_gradient)
        decoder = self._decoder_for(layout, len(rows), part.checkpoints)
        with decoder as decode, torch.set_grad_enabled(want_gradient):
            losses = self._losses(rows, layout, objective, part.checkpoints, decode)
            launched()
            gradient = torch.autograd.grad(losses.sum(), rows)[0] if want_gradient else None
            return losses.detach().to(self.device), gradient

    def logits(
        self, embeds: Tensor, mask: Tensor, labels: Tensor, images: Images = ()
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Logits at every labelled token, as a graph over the embeddings; for a batch that fits into memory whole.

        Args:
            embeds: ``(B, T, d)`` float.
            mask: ``(B, T)`` bool.
            labels: ``(B, T)`` int64, -100 where nothing is to be predicted.
            images: of each sample.

        Returns:
            Logits ``(N, V)`` of the N labelled tokens, sample by sample; their labels ``(N,)``; how many each has.
        """
        layout = lay_out(mask, labels, images)
        found: Tensor = self._part.head(self.states(embeds, layout))
        targets = layout.targets.to(found.device, non_blocking=True)
        return found, targets, layout.counts

    def _losses(
        self, embeds: Tensor, layout: Layout, objective: str, checkpoints: int, decode: Decode | None
    ) -> Tensor:
        """Losses ``(B,)`` on the model's device, as a graph over ``embeds`` ``(B, T, d)``."""
        hidden = self.states(embeds, layout, checkpoints, decode)
        targets = layout.targets.to(hidden.device, non_blocking=True)
        with current(hidden.device):
            return sample_losses(self._part.head, hidden, targets, layout.counts, objective)

    def states(
        self, embeds: Tensor, layout: Layout, checkpoints: int = 0, decode: Decode | None = None
    ) -> Tensor:
        """Hidden states ``(N, d)`` that predict the layout's labels, as a graph over ``embeds`` ``(B, T, d)``.

        Args:
            embeds: ``(B, T, d)``.
            layout: of the batch.
            checkpoints: blocks that keep their input alone.
            decode: stands for the decoder.
        """
        x = layout.align(embeds.to(self.device, self.dtype))  # (B, L, d)
        chosen = layout.chosen.to(self.device, non_blocking=True)
        with self.turn, self._blocks.checkpointed(checkpoints):
            states = self._decode(x, layout.images) if decode is None else decode(x)
        return states.flatten(0, 1).index_select(0, chosen).to(self._head_device)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Within the ``with`` block kernels are launched on ``device``, as Triton's need it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def sample_losses(
    head: nn.Module, hidden: Tensor, labels: Tensor, counts: list[int], objective: str
) -> Tensor:
    """Loss ``(B,)`` of each sample: the mean over its tokens.

    Args:
        head: maps hidden states to logits.
        hidden: ``(N, d)``, sample by sample.
        labels: ``(N,)`` that they predict.
        counts: how many each sample has, summing to N.
        objective: name of the token loss.

    Raises:
        ConfigError: unknown objective.
    """
    tokens = _token_losses(head, hidden, labels, objective)
    # Sample by sample rather than by a scatter: the order of the sum is that of the lone sample.
    return torch.stack([t.mean() for t in torch.split(tokens, counts)])


def _token_losses(head: nn.Module, hidden: Tensor, labels: Tensor, objective: str) -> Tensor:
    """Loss ``(N,)`` of each label ``(N,)`` predicted from ``hidden`` ``(N, d)``; logits never whole on a GPU."""
    from fednano.training.objectives import get_objective

    kernels = kernels_for(hidden)
    plain = type(head) is nn.Linear and head.bias is None
    if kernels is None or not plain or objective not in kernels.OBJECTIVES or objective == "npo":
        return get_objective(objective)(head(hidden), labels)
    losses: Tensor = kernels.linear_token_loss(
        hidden, head.weight, labels, objective, labelled_rows=len(labels)
    )
    return losses
