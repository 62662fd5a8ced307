"""Where operators run, what the package exports, and the table of block sizes."""

from __future__ import annotations

import json
import subprocess
import sys

import fednano_kernels
import pytest
import torch
from fednano_kernels import _tuning, nano_adapter, nano_adapter_reference

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it now fails
import torch, fednano_kernels as k
x, a, b = torch.randn(4, 8), torch.randn(8, 2), torch.randn(2, 8)
assert torch.equal(k.nano_adapter(x, a, b), k.nano_adapter_reference(x, a, b, 1.0, "linear"))
assert k.linear_token_loss(x, torch.randn(9, 8), torch.tensor([0, 8, -100, 3])).shape == (4,)
assert k.seeded_uniform(torch.tensor(3), 2, 5, 1.0).shape == (2, 5)
"""


def test_works_without_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_all_is_what_is_there() -> None:
    public = {name for name in vars(fednano_kernels) if not name.startswith("_") and name != "TYPE_CHECKING"}
    modules = {name for name in public if name not in fednano_kernels.__all__}
    assert set(fednano_kernels.__all__) <= public
    assert all(f"fednano_kernels.{name}" in sys.modules for name in modules), (
        "a public name is missing in __all__"
    )


def test_plain_cpu_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, a, b = torch.randn(4, 8), torch.randn(8, 2), torch.randn(2, 8)
    assert torch.equal(nano_adapter(x, a, b), nano_adapter_reference(x, a, b, 1.0, "linear"))


def test_float64_takes_the_reference(device: torch.device) -> None:
    x, a, b = (torch.randn(s, dtype=torch.float64, device=device) for s in ((4, 8), (8, 2), (2, 8)))
    assert torch.equal(nano_adapter(x, a, b), nano_adapter_reference(x, a, b, 1.0, "linear"))


def test_table_has_positive_integers_only() -> None:
    table = json.loads(_tuning.TABLE.read_text(encoding="utf-8"))
    assert table
    for card in table.values():
        major, minor = card["capability"].split(".")
        assert int(major) >= 7
        assert int(minor) >= 0
        for rows in card["kernels"].values():
            for config in rows.values():
                assert all(isinstance(v, int) and v >= 0 for v in config.values())


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [("Known", (9, 0), 1), ("Sibling of the same capability", (9, 0), 1), ("Stranger", (12, 3), 7)],
)
def test_a_cards_name_is_never_an_error(
    name: str, capability: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"Known": {"capability": "9.0", "kernels": {"k": {"row": {"A": 1}}}}}
    monkeypatch.setattr(_tuning, "load_table", lambda: table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    _tuning._rows.cache_clear()
    try:
        device = torch.device("cuda", 0)
        assert _tuning.choose("k", device, "row", {"A": 7, "B": 2}) == {"A": expected, "B": 2}
        assert _tuning.choose("k", device, "another row", {"A": 7}) == {"A": 7}
    finally:
        _tuning._rows.cache_clear()
