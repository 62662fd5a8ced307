"""What every kernel test shares: the device, the accuracy rule, and outputs that are poisoned before each run.

With a GPU the tests run on it. Without one, the Triton code runs in triton's interpreter on CPU tensors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first cuBLAS call, for determinism


@pytest.fixture(scope="package")
def device() -> Iterator[torch.device]:
    """Where Triton code runs."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    pytest.importorskip("triton")
    # Triton decides when it is imported whether functions are compiled or interpreted, and transformers may have
    # imported it already: give the kernels a copy of their own, and give the old one back afterwards.
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_triton(name)}
    for name in [n for n in sys.modules if n.startswith("fednano_kernels.") and n.endswith("_triton")]:
        del sys.modules[name]
    os.environ["TRITON_INTERPRET"] = "1"
    yield torch.device("cpu")
    del os.environ["TRITON_INTERPRET"]
    for name in list(sys.modules):
        if _is_triton(name) or (name.startswith("fednano_kernels.") and name.endswith("_triton")):
            del sys.modules[name]
    sys.modules.update(before)


def _is_triton(name: str) -> bool:
    # The compiled extension can be loaded only once in a process.
    return (name == "triton" or name.startswith("triton.")) and not name.startswith("triton._C")


@pytest.fixture(autouse=True)
def _poisoned(device: torch.device) -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that an element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


def _error(got: Tensor, exact: Tensor) -> float:
    difference = (got.detach().double().cpu() - exact.detach().double().cpu()).norm()
    return float(difference / exact.detach().double().cpu().norm().clamp_min(1e-30))


@pytest.fixture(scope="session")
def assert_accurate() -> Callable[[Tensor, Tensor, Tensor, str], None]:
    """The rule: relative error against float64 at most twice that of plain torch in the same dtype."""

    def check(got: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
        assert got.shape == exact.shape, f"{what}: {got.shape} != {exact.shape}"
        assert got.isfinite().all(), f"{what}: not finite, or never written"
        ours, theirs = _error(got, exact), _error(plain, exact)
        assert ours <= 2 * theirs + 1e-6, f"{what}: error {ours:.3e}, plain torch {theirs:.3e}"

    return check
