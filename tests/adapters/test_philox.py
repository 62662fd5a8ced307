"""The generator against Random123's published vectors, against Triton, and its distributions."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fednano.adapters import philox

# Philox4x32-10 rows of kat_vectors in Random123 (Salmon et al.): counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_rounds_give_the_published_vectors(counter: str, key: str, expected: str) -> None:
    low, high = _numbers(key)
    c0, c1, c2, c3 = (torch.tensor([word]) for word in _numbers(counter))
    got = philox.philox4x32((c0, c1, c2, c3), low | high << 32)
    assert [int(word) for word in got] == _numbers(expected)


def test_mapping_of_elements_and_planes() -> None:
    k = philox.key(3, "site", "leaf")
    stack = philox.words(k, 5, planes=6)
    for plane in range(6):
        for element in range(5):
            zero = torch.tensor([0])
            block = philox.philox4x32((zero + element, zero + plane // 4, zero, zero), k)
            assert int(stack[plane, element]) == int(block[plane % 4])
    assert torch.equal(philox.words(k, 5, planes=3, first=2), stack[2:5])
    assert torch.equal(philox.words(k, 5)[0], stack[0])


def test_chunks_do_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    k = philox.key(0, "a", "b")
    whole = philox.uniform(k, (7, 9)), philox.normal(k, (7, 9))
    monkeypatch.setattr(philox, "_CHUNK", 10)
    assert torch.equal(philox.uniform(k, (7, 9)), whole[0])
    assert torch.equal(philox.normal(k, (7, 9)), whole[1])


def test_key_is_the_documented_hash() -> None:
    digest = hashlib.sha256(b"fednano/philox/1|7|model.q_proj|A").digest()
    assert philox.key(7, "model.q_proj", "A") == int.from_bytes(digest[:8], "little")
    assert len({philox.key(s, a, b) for s in (0, 1) for a in ("x", "y") for b in ("A", "B")}) == 8


def test_uniform_is_one_exact_product() -> None:
    k = philox.key(1, "s", "u")
    got = philox.uniform(k, (4000,), 0.25)
    word = philox.words(k, 4000)[0].double()
    exact = (2 * (word / 256).floor() - (2**24 - 1)) * (0.25 / 2**24)
    assert torch.equal(got, exact.float())  # 0.25 / 2**24 is a power of two: no rounding at all
    assert float(got.abs().max()) < 0.25


def test_moments() -> None:
    n = 200_000
    u = philox.uniform(philox.key(0, "m", "u"), (n,)).double()
    z = philox.normal(philox.key(0, "m", "n"), (n,), 2.0).double()
    assert abs(float(u.mean())) < 5 / math.sqrt(n)
    assert float(u.var()) == pytest.approx(1, abs=0.01)
    assert abs(float(z.mean())) < 10 / math.sqrt(n)
    assert float(z.std()) == pytest.approx(2, rel=0.01)
    kurtosis = float(((z / z.std()) ** 4).mean()) - 3
    assert kurtosis == pytest.approx(-0.15, abs=0.05)


def test_samples_are_distinct_prefixes() -> None:
    k = philox.key(0, "c", "i")
    for n, count in ((100, 60), (100, 20), (10**9, 5000)):
        picked = philox.sample(k, n, count).tolist()
        assert len(set(picked)) == count
        assert min(picked) >= 0
        assert max(picked) < n
        assert philox.sample(k, n, count * 2 // 3).tolist() == picked[: count * 2 // 3]
    assert sorted(philox.permutation(5, 50).tolist()) == list(range(50))


SCRIPT = """
import sys, torch, triton, triton.language as tl
@triton.jit
def kernel(out, seed, plane, N: tl.constexpr):
    offset = tl.arange(0, N)
    zero = offset * 0
    a, b, c, d = tl.philox(seed, offset, zero + plane, zero, zero)
    for lane in tl.static_range(4):
        word = a if lane == 0 else (b if lane == 1 else (c if lane == 2 else d))
        tl.store(out + lane * N + offset, word.to(tl.int64))
    tl.store(out + 4 * N + offset, tl.randint(seed, offset).to(tl.uint32).to(tl.int64))
out = torch.zeros(5 * 16, dtype=torch.int64, device=sys.argv[3])
kernel[(1,)](out, int(sys.argv[1]), int(sys.argv[2]), N=16)
print(" ".join(str(int(word) & 0xFFFFFFFF) for word in out))
"""


def _triton_words(folder: Path, k: int, plane: int, device: str) -> torch.Tensor:
    """Run the kernel in a process of its own: interpreter or compiler must be chosen before Triton is imported."""
    script = folder / "words.py"  # Triton reads a kernel's source back from its file
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script), str(philox.signed(k)), str(plane), device],
        env={**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return torch.tensor([int(word) for word in run.stdout.split()]).view(5, 16)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_triton_gives_the_same_words(device: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    k = philox.key(11, "bridge", "A")
    got = _triton_words(tmp_path, k, 2, device)
    assert torch.equal(got[:4], philox.words(k, 16, planes=4, first=8))
    assert torch.equal(got[4], philox.words(k, 16)[0])


def test_ternary_is_sparse_with_unit_variance() -> None:
    got = philox.ternary(philox.key(0, "t", "B"), (3, 20_000), planes=True)
    share = [float((got.sign() == sign).double().mean()) for sign in (-1, 0, 1)]
    assert share == pytest.approx([1 / 6, 2 / 3, 1 / 6], abs=0.01)
    assert float(got.double().square().mean()) == pytest.approx(1, abs=0.02)


def test_key_may_be_a_tensor() -> None:
    k = philox.key(0, "t", "B")
    assert torch.equal(philox.words(torch.tensor(philox.signed(k)), 8), philox.words(k, 8))
