"""Fixed-point sums: exact on their grid, in any order, never overflowing, and with the stated error."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.aggregation import FixedSum, Grid, Refusal
from fednano.aggregation.weighted import add_weighted
from fednano.errors import ConfigError


def exact(grid: Grid, terms: list[tuple[float, torch.Tensor]]) -> list[Fraction]:
    """Sum of factor * x in rational numbers."""
    size = terms[0][1].numel()
    return [sum((Fraction(w) * Fraction(float(x[i])) for w, x in terms), Fraction(0)) for i in range(size)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    clients=st.integers(1, 9),
    admitted=st.sampled_from([9, 100, 4096, 10_000, 2**20]),
    bound=st.sampled_from([1.0, 3.0, 64.0, 2.0**21]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_error_bound_against_rationals(
    seed: int, clients: int, admitted: int, bound: float, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(seed)
    grid = Grid.covering(bound, admitted)
    total = FixedSum(grid, {"x": (3, 4)})
    terms = []
    for _ in range(clients):
        x = (torch.rand(12, generator=g) * 2 - 1).to(dtype)
        w = float(torch.rand((), generator=g, dtype=torch.float64)) * bound
        total.add({"x": x.reshape(3, 4)}, w)
        terms.append((w, x))
    got = total.value("x").reshape(-1)
    for value, want in zip(got.tolist(), exact(grid, terms), strict=True):
        assert abs(Fraction(value) - want) <= clients * Fraction(grid.step) + abs(want) * Fraction(2) ** -52


def test_any_order_and_any_grouping_gives_the_same_bits() -> None:
    g = torch.Generator().manual_seed(3)
    grid = Grid.covering(8.0, 5)
    terms = [(0.1 + 0.3 * k, torch.randn(1000, generator=g)) for k in range(5)]
    seen = set()
    for order in itertools.permutations(range(5)):
        total = FixedSum(grid, {"x": (1000,)})
        for k in order:
            total.add({"x": terms[k][1]}, terms[k][0])
        seen.add(total.integers()["x"].numpy().tobytes())
    assert len(seen) == 1
    # the same sum in plain floats does depend on the order, or the test above would show nothing
    floats = set()
    for order in itertools.permutations(range(5)):
        acc = torch.zeros(1000)
        for k in order:
            acc += terms[k][0] * terms[k][1]
        floats.add(acc.numpy().tobytes())
    assert len(floats) > 1


def test_ties_do_not_depend_on_the_running_sum() -> None:
    grid = Grid.covering(2.0**40, 4)  # step 2**-11: halves of a step are representable terms
    half = torch.tensor([grid.step / 2, 3 * grid.step / 2, -grid.step / 2], dtype=torch.float64)
    one = torch.tensor([grid.step] * 3, dtype=torch.float64)
    for first, second in ((half, one), (one, half)):
        total = FixedSum(grid, {"x": (3,)})
        total.add({"x": first}, 1.0)
        total.add({"x": second}, 1.0)
        assert total.integers()["x"].tolist() == [
            1,
            3,
            1,
        ]  # 0.5 -> 0, 1.5 -> 2, -0.5 -> 0: each term to even, then the sum


@pytest.mark.parametrize("clients", [1, 2, 3, 1000, 2048, 2049])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_overflow_at_the_bound(clients: int, sign: float) -> None:
    grid = Grid.covering(10.0, clients)
    assert clients * 2**grid.bits <= 2**62
    total = FixedSum(grid, {"x": (2,)})
    for _ in range(clients):
        total.add({"x": torch.full((2,), sign * grid.bound, dtype=torch.float64)}, 1.0)
    assert total.integers()["x"].tolist() == [int(sign) * clients * 2**grid.bits] * 2
    assert total.value("x").tolist() == [sign * clients * grid.bound] * 2
    with pytest.raises(Refusal) as refused:
        total.add({"x": torch.zeros(2)}, 1.0)
    assert refused.value.reason == "capacity"


@given(bound=st.floats(1e-20, 1e20), clients=st.integers(1, 2**40))
def test_grid_covers_and_cannot_overflow(bound: float, clients: int) -> None:
    grid = Grid.covering(bound, clients)
    assert bound <= grid.bound < 2 * bound * (1 + 1e-12)
    assert clients * 2**grid.bits <= 2**62
    assert grid.bits <= 51


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (math.nan, "nonfinite"),
        (math.inf, "nonfinite"),
        (-math.inf, "nonfinite"),
        (1e30, "norm"),
        (17.0, "norm"),
    ],
)
@pytest.mark.parametrize("where", [0, 40_000, 99_999])
def test_a_refused_term_leaves_no_trace(bad: float, reason: str, where: int) -> None:
    g = torch.Generator().manual_seed(0)
    total = FixedSum(Grid.covering(16.0, 8), {"a": (7,), "b": (100_000,)})
    good = {"a": torch.randn(7, generator=g), "b": torch.randn(100_000, generator=g)}
    total.add(good, 1.5)
    before = total.integers()
    poisoned = {"a": good["a"], "b": good["b"].clone()}
    poisoned["b"][where] = bad
    with pytest.raises(Refusal) as refused:
        total.add(poisoned, 1.0)
    assert refused.value.reason == reason
    assert total.count == 1
    after = total.integers()
    assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(Refusal) as refused:
        total.add({"a": good["a"], "b": good["b"][:5]}, 1.0)
    assert refused.value.reason == "schema"
    assert all(torch.equal(before[k], v) for k, v in total.integers().items())


def test_large_values_whose_squares_overflow_are_still_accepted() -> None:
    total = FixedSum(Grid.covering(1e200, 2), {"x": (3,)})
    total.add({"x": torch.tensor([1e199, -9e199, 0.0], dtype=torch.float64)}, 1.0)
    assert total.value("x")[1].item() == pytest.approx(-9e199, rel=1e-12)


def test_weighted_pair_and_write() -> None:
    g = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, f = torch.randn(50_000, generator=g).to(dtype), torch.rand(50_000, generator=g).to(dtype)
        top, below = (FixedSum(Grid.covering(bound, 2), {"x": (50_000,)}) for bound in (64.0, 4.0))
        add_weighted(top, below, {"x": x}, {"x": f}, {"x": 2.0}, {"x": (0.25, 0.75)}, 16.0)
        w = f.double().clamp(0.25, 0.75)
        assert (top.value("x") - 2.0 * x.double() * w).abs().max() <= top.grid.step
        assert (below.value("x") - 2.0 * w).abs().max() <= below.grid.step
        assert torch.equal(top.write("x", 2.0, torch.float32), top.value("x", 2.0).float())
        assert torch.equal(top.integers()["x"].double() * top.grid.step, top.value("x"))
        assert torch.equal(top.ratio("x", below, torch.float32), (top.value("x") / below.value("x")).float())


def test_add_and_remove_restore_the_bits() -> None:
    g = torch.Generator().manual_seed(1)
    total = FixedSum(Grid.covering(64.0, 4), {"x": (70_000,)})
    total.add({"x": torch.randn(70_000, generator=g)}, 1.5)
    before, other = total.integers()["x"], torch.randn(70_000, generator=g)
    total.add({"x": other}, 0.3)
    assert not torch.equal(total.integers()["x"], before)
    total.remove({"x": other}, 0.3)
    assert torch.equal(total.integers()["x"], before)
    assert total.count == 1


def test_threads_do_not_change_the_bits() -> None:
    g = torch.Generator().manual_seed(2)
    shapes = {"a": (150_001,), "b": (7, 11_003)}
    terms = [{n: torch.randn(s, generator=g) for n, s in shapes.items()} for _ in range(3)]
    weights = {n: torch.rand(s, generator=g) for n, s in shapes.items()}
    before, seen = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            plain, top, below = (FixedSum(Grid.covering(64.0, 4), shapes) for _ in range(3))
            for x in terms:
                plain.add(x, 1.7)
                add_weighted(
                    top, below, x, weights, {"a": 1.0, "b": 2.0}, dict.fromkeys(shapes, (0.1, 0.9)), 16.0
                )
            seen.add(b"".join(s.integers()[n].numpy().tobytes() for s in (plain, top, below) for n in shapes))
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("bound", "clients"), [(0.0, 1), (-1.0, 1), (math.nan, 1), (math.inf, 1), (1.0, 0), (1.0, 2**41)]
)
def test_bad_grids(bound: float, clients: int) -> None:
    with pytest.raises(ConfigError):
        Grid.covering(bound, clients)
