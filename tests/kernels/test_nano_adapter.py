"""nano_adapter against float64, against plain torch, and against bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fednano_kernels import KernelArgumentError, nano_adapter
from torch import Tensor

Accurate = Callable[[Tensor, Tensor, Tensor, str], None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = [(1, 24, 1), (47, 40, 7), (35, 130, 4), (33, 64, 16), (20, 48, 64)]
LARGE = [(1, 100, 1), (1, 4096, 16), (47, 100, 7), (47, 1000, 64), (4097, 1000, 4), (4097, 1024, 1), (4097, 4096, 16),
         (4097, 4096, 64)]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(change: Callable[..., tuple[Tensor, ...]], message: str, device: torch.device) -> None:
    x, a, b, _ = _inputs(5, 24, 4, torch.float32, device)
    with pytest.raises(KernelArgumentError, match=message):
        nano_adapter(*change(x, a, b))


def test_unknown_activation(device: torch.device) -> None:
    x, a, b, _ = _inputs(5, 24, 4, torch.float32, device)
    with pytest.raises(KernelArgumentError, match="activation is 'relu'"):
        nano_adapter(x, a, b, 1.0, "relu")


@pytest.mark.gpu
def test_more_than_2_31_elements(device: torch.device) -> None:
    d, m = 4096, 2**31 // 4096 + 64
    x = torch.zeros(m, d, device=device, dtype=torch.bfloat16)
    x[-64:] = torch.randn(64, d, device=device)
    a, b = (torch.randn(s, device=device, dtype=torch.bfloat16) / 16 for s in ((d, 16), (16, d)))
    y = nano_adapter(x, a, b, 1.0, "gelu")
    assert torch.equal(y[-64:], nano_adapter(x[-64:].clone(), a, b, 1.0, "gelu"))
