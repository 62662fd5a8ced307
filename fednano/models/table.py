"""The table of token embeddings, left in its file: a client reads the few rows that its texts need.

Beside a vision encoder the table is the largest thing that a client holds (LLaVA-1.5-7B: 0.26 of 0.92 GB), and of its
rows it uses those of its own words. Safetensors lie in their file as they lie in memory, so the kernel can map them: a
row is read when it is first used, and clients on one machine share what was read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fednano.models.files import ModelFiles, read_tensors

__all__ = ["StoredTable", "leave_on_disk"]

SMALL_BYTES = 32 << 20
"""Tables below this stay in memory: a file that is replaced under a running client would end it."""
_ROWS = 4096


class StoredTable(nn.Module):
    """Rows of a table ``(V, d)`` in a mapped file. Has no parameters, and stays where it is when a model moves.

    Args:
        table: ``(V, d)``, mapped.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.num_embeddings = table, len(table)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``(...)`` to embeddings ``(..., d)``, on the CPU and in the file's type."""
        return nn.functional.embedding(ids.cpu(), self.table)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"{tuple(self.table.shape)}, {self.table.dtype} on disk"


def leave_on_disk(files: ModelFiles, table: Any, wanted: Callable[[str], bool]) -> nn.Module:
    """A module that gives the rows of ``table`` from the checkpoint's file; ``table`` itself if that cannot be.

    It cannot where the module does more than look up, and where no tensor of the checkpoint is the table: transformers
    may have made it of several, or of another form.

    Args:
        files: the checkpoint.
        table: what transformers loaded, on the CPU.
        wanted: whether a key of the checkpoint may be that of the table.
    """
    if type(table) is not nn.Embedding or table.max_norm is not None or table.weight.nbytes < SMALL_BYTES:
        return table  # type: ignore[no-any-return]
    for stored in read_tensors(files, wanted).values():
        if stored.shape == table.weight.shape and _same(stored, table.weight):
            return StoredTable(stored)
    return table


def _same(stored: Tensor, loaded: Tensor) -> bool:
    """Whether a tensor becomes the other when its type is changed; compared by parts, so that no copy is made."""
    return all(
        torch.equal(stored[at : at + _ROWS].to(loaded.dtype), loaded[at : at + _ROWS])
        for at in range(0, len(stored), _ROWS)
    )
