"""The repeated blocks of a decoder: where a pass is compiled, and where it can be computed again instead of kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Blocks", "repeated_blocks", "stand_aside"]


_HERE = threading.local()
"""How many blocks a pass on this thread computes again."""


class Blocks:
    """Stands in front of each block's ``forward``, from the first time that it has something to do there.

    Args:
        decoder: the model; the list of equal modules that holds most of its parameters are its blocks.
        compiled: compile each block with ``torch.compile``, for any number of samples and tokens.
    """

    def __init__(self, decoder: nn.Module, *, compiled: bool = False) -> None:
        self._blocks = repeated_blocks(decoder)
        if compiled and self._blocks:
            # One graph serves all blocks; variants arise from one sample or several, with and without gradients.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
            self._stand(compiled=True)

    def __len__(self) -> int:
        """How many there are; 0 where a decoder has no repeated blocks."""
        return len(self._blocks)

    @contextmanager
    def checkpointed(self, count: int) -> Iterator[None]:
        """Within the ``with`` block, on this thread, the first ``count`` blocks keep their inputs alone."""
        if count:
            self._stand()
        _HERE.count = count
        try:
            yield
        finally:
            _HERE.count = 0

    def _stand(self, *, compiled: bool = False) -> None:
        for number, block in enumerate(self._blocks):
            forward = block.forward
            if isinstance(forward, _Forward):
                if not compiled:
                    continue
                forward = forward.plain
            if compiled:
                forward = torch.compile(forward, dynamic=True)
            block.forward = _Forward(number, forward)


class _Forward:
    """A block's forward, which is computed again on the way back if the thread says so."""

    def __init__(self, number: int, plain: Callable[..., Any]) -> None:
        self._number, self.plain = number, plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._number < getattr(_HERE, "count", 0):
            return checkpoint(self.plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return self.plain(*args, **kwargs)


def stand_aside(decoder: nn.Module) -> None:
    """Give each block its own ``forward`` back: what others put in front of one now must not stand before `Blocks`.

    A pass that is computed again would otherwise be computed again inside of itself.
    """
    for block in repeated_blocks(decoder):
        if isinstance(block.forward, _Forward):
            block.forward = block.forward.plain


def repeated_blocks(decoder: nn.Module) -> list[nn.Module]:
    """The list of equal modules that holds most of a decoder's parameters; empty if there is none."""
    found: list[nn.Module] = []
    most = 0
    for module in decoder.modules():
        if not isinstance(module, nn.ModuleList) or len({type(block) for block in module}) != 1:
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > most:
            found, most = list(module), size
    return found
