"""Compiled loops: word for word what torch adds, refused alike, and not loaded where they do not pay."""

from __future__ import annotations

import builtins
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.aggregation import FixedSum, Grid, Refusal, create_rule, layout_of, native, vector_of
from fednano.aggregation.chunks import U64
from fednano.aggregation.weighted import add_weighted
from fednano.errors import ConfigError

pytest.importorskip("numba", reason="the extra 'native' is not installed")

MAGIC = 1.5 * 2.0**52
FLOATS = {torch.float32: 32, torch.float64: 64, torch.float16: 16, torch.bfloat16: 32}


@contextmanager
def mode(value: str) -> Iterator[None]:
    """``FEDNANO_NATIVE`` for a while; a fixture would not be set anew for each of hypothesis's examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDNANO_NATIVE", value)
        yield


@st.composite
def tensors(
    draw: st.DrawFn, size: int, dtype: torch.dtype, top: float, low: float | None = None
) -> torch.Tensor:
    """Vectors with subnormals, both zeros, halves of a step, the largest values, and random mantissas among them."""
    width = FLOATS[dtype]
    bound = float(np.array(top, f"float{width}"))
    least = -bound if low is None else low
    special = st.floats(least, bound, width=width)  # likes subnormals, -0.0 and the ends
    some = draw(st.lists(special, min_size=0, max_size=min(size, 12)))
    fill = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.rand(size, generator=fill, dtype=torch.float64) * (top - least) + least
    x *= 2.0 ** -draw(st.integers(0, 60)) if low is None else 1.0
    for value in some:
        x[draw(st.integers(0, size - 1))] = value
    return x.to(dtype).clamp(least, bound)


def words(total: FixedSum) -> dict[str, list[int]]:
    return {name: ring.tolist() for name, ring in total.ring.items()}


def outcome(work: Callable[[], object]) -> tuple[str, str]:
    try:
        work()
    except Refusal as refused:
        return refused.reason, str(refused)
    return "", ""


sizes = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 259])
factors = st.floats(2.0**-30, 1.0, exclude_min=True)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), dtype=st.sampled_from(list(FLOATS)), size=sizes, clients=st.sampled_from([1, 7, 2**20])
)
def test_every_word_is_torchs(data: st.DataObject, dtype: torch.dtype, size: int, clients: int) -> None:
    top = data.draw(st.sampled_from([1.0, 3.0, 100.0, 2.0**-100, 2.0**14]))
    shapes = {"a": (size,), "b": (3, 5)}
    grid = Grid.covering(top * 1.0001, max(clients, 3))
    sums = {"on": FixedSum(grid, shapes), "off": FixedSum(grid, shapes)}
    for _ in range(data.draw(st.integers(1, 3))):
        terms = {n: data.draw(tensors(math.prod(s), dtype, top)).reshape(s) for n, s in shapes.items()}
        factor = data.draw(factors) * data.draw(st.sampled_from([1.0, -1.0]))
        for how, total in sums.items():
            with mode(how):
                total.add(terms, factor)
    assert words(sums["on"]) == words(sums["off"])
    with mode("on"):
        sums["on"].remove(terms, factor)
    with mode("off"):
        sums["off"].remove(terms, factor)
    assert words(sums["on"]) == words(sums["off"])


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    x_dtype=st.sampled_from([torch.float32, torch.float64]),
    w_dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    size=sizes,
)
def test_every_word_of_a_pair_is_torchs(
    data: st.DataObject, x_dtype: torch.dtype, w_dtype: torch.dtype, size: int
) -> None:
    low, high = data.draw(st.sampled_from([(0.05, 32.0), (1e-30, 1.0), (0.7, 0.7), (0.1, 1e300)]))
    factor = data.draw(factors)
    x = {"a": data.draw(tensors(size, x_dtype, 100.0)), "b": torch.zeros(3, dtype=x_dtype)}
    w = {
        "a": data.draw(tensors(size, w_dtype, 40.0, 0.0)),
        "b": torch.tensor([-0.0, 1.0, 0.3], dtype=w_dtype),
    }
    found = {}
    for how in ("on", "off"):
        pair = [FixedSum(Grid.covering(bound, 9), {"a": (size,), "b": (3,)}) for bound in (4100.0, 41.0)]
        with mode(how):
            for _ in range(2):
                add_weighted(*pair, x, w, {"a": factor, "b": 0.3}, dict.fromkeys(x, (low, high)), 101.0)
        found[how] = [words(total) for total in pair] + [total.count for total in pair]
    assert found["on"] == found["off"]


def loop_or_skip(dtype: torch.dtype) -> native.Loop:
    """The loop, which there must be where torch is known to fuse."""
    loop = native.loop_for("add", torch.zeros(1, dtype=dtype).numpy())
    if loop is None:
        assert torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")
        pytest.skip("torch does not fuse on this processor")
    return loop


def nearest(value: Fraction) -> int:
    """Rounded to the nearest integer, a tie to the even one."""
    down, rest = divmod(value.numerator, value.denominator)
    return down + (2 * rest > value.denominator or (2 * rest == value.denominator and down % 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_are_exact_products_rounded_once(dtype: torch.dtype) -> None:
    loop = loop_or_skip(dtype)
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(1001, generator=g, dtype=torch.float64) * 2 - 1).to(dtype)
    x[:6] = torch.tensor([0.0, -0.0, 2.0**-51, 3 * 2.0**-51, -(2.0**-51), 5e-324])
    for scaled in (2.0**50, 0.7 * 2.0**51, 1.0, 2.0**-20):
        ring = np.zeros(1001, np.uint64)
        assert loop(ring, x.numpy(), scaled, np.uint64(0)) == float(x.abs().max())
        offset = int(np.float64(MAGIC).view(np.uint64))
        got = [(word - offset + 2**63) % 2**64 - 2**63 for word in ring.tolist()]
        assert got == [nearest(Fraction(scaled) * Fraction(float(v))) for v in x]
        loop(ring, x.numpy(), scaled, np.uint64(2**64 - 1))
        assert not ring.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, 1e30, -17.0])
@pytest.mark.parametrize("where", [0, 5, 63, 64])
def test_refused_as_by_torch_and_without_a_trace(dtype: torch.dtype, bad: float, where: int) -> None:
    x = {n: torch.linspace(-1, 1, s, dtype=dtype) for n, s in (("a", 7), ("b", 65), ("c", 3))}
    poisoned = {**x, "b": x["b"].clone()}
    poisoned["b"][where] = bad
    w = {n: torch.full_like(t, 0.5) for n, t in x.items()}
    told = {}
    for how in ("on", "off"):
        one, top, below = (
            FixedSum(Grid.covering(bound, 8), {n: tuple(t.shape) for n, t in x.items()})
            for bound in (16.0, 16.0, 1.0)
        )
        pair = (dict.fromkeys(x, 1.0), dict.fromkeys(x, (0.1, 0.9)), 16.0)
        with mode(how):
            one.add(x, 1.0)
            add_weighted(top, below, x, w, *pair)
            before = [words(total) for total in (one, top, below)]
            told[how] = (
                outcome(lambda one=one: one.add(poisoned, 1.0)),
                outcome(lambda top=top, below=below, pair=pair: add_weighted(top, below, poisoned, w, *pair)),
            )
            assert [words(total) for total in (one, top, below)] == before
            assert [total.count for total in (one, top, below)] == [1, 1, 1]
    assert told["on"] == told["off"]
    assert told["on"][0][0] == told["on"][1][0] == ("norm" if math.isfinite(bad) else "nonfinite")


@pytest.mark.parametrize("how", ["on", "off"])
@pytest.mark.parametrize(("bound", "factor"), [(1e200, 1.0), (1.0, 0.0), (1e-25, 1.0)])
def test_bounds_whose_squares_a_float_cannot_hold(how: str, bound: float, factor: float) -> None:
    total = FixedSum(Grid.covering(bound, 2), {"x": (3,)})
    with mode(how):
        for bad in (math.inf, math.nan, *([4 * bound] if bound < 1 else [])):
            assert outcome(lambda bad=bad: total.add({"x": torch.tensor([0.0, bad, 0.0])}, factor))[0]
        total.add({"x": torch.tensor([0.0, min(bound, 1e30), 0.0])}, factor)
    assert total.count == 1


def test_a_clamp_beyond_float32_clamps_nothing() -> None:
    x, f = torch.ones(4), torch.tensor([1e37, 2e37, 3e38, 1e38])
    for how in ("on", "off"):
        top, below = (FixedSum(Grid.covering(64.0, 2), {"x": (4,)}) for _ in range(2))
        with mode(how):
            add_weighted(top, below, {"x": x}, {"x": f}, {"x": 1e-37}, {"x": (1e30, 1e40)}, 1.0)
        assert torch.allclose(top.value("x"), f.double() * 1e-37)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    memory = bytearray(1) + bytearray(x.numpy().tobytes())
    return torch.frombuffer(memory, dtype=x.dtype, offset=1)


@pytest.mark.parametrize(
    ("form", "taken"),
    [
        (lambda x: x, True),
        (lambda x: x.clone().requires_grad_(), True),
        (torch.nn.Parameter, True),
        (lambda x: torch.stack([x, x], 1)[:, 0], False),
        (unaligned, False),
        (lambda x: torch.complex(x, -x).conj().imag.contiguous(), True),
        (lambda x: torch.complex(x[:1], -x[:1]).conj().imag, False),
        (lambda x: x.half(), False),
        (lambda x: x.bfloat16(), False),
    ],
)
def test_whatever_the_memory_looks_like(form: Callable[[torch.Tensor], torch.Tensor], taken: bool) -> None:
    x = form(torch.randn(33, generator=torch.Generator().manual_seed(1)))
    assert (native.vector(x) is not None) == taken
    found = []
    for how in ("on", "off"):
        total = FixedSum(Grid.covering(64.0, 2), {"x": tuple(x.shape)})
        with mode(how):
            total.add({"x": x}, 1.3)
        found.append(words(total))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fisher", "rolora", "qfedavg", "scaffold", "fedexp"])
def test_rules_and_secure_vectors(make_spec, make_updates, name: str) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec(dtype=torch.float32)
    rule = create_rule(name)
    updates = make_updates(spec, 4, fisher=True)
    current = {n: torch.zeros(leaf.shape) for n, leaf in spec.leaves.items()}
    found = []
    for how in ("on", "off"):
        with mode(how):
            state = rule.init(spec, current=current, round=3)
            for update in updates:
                names = rule.travelling(spec, 3)
                kept = {n: update.leaves[n] for n in names}
                info = {n: update.fisher[n] for n in names}
                mine = type(update)(**{**update.__dict__, "leaves": kept, "fisher": info})
                state = rule.add(state, mine)
            merged = {n: t.numpy().tobytes() for n, t in rule.finish(state).items()}
            vector = b""
            if rule.capability.secure_aggregation:
                layout = layout_of(rule, spec, current, round=3)
                vector = vector_of(layout, rule, spec, current, mine, round=3).tobytes()
        found.append((merged, vector))
    assert found[0] == found[1]


# When the loops are used


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("FEDNANO_NATIVE", raising=False)
    monkeypatch.setattr(native._Merged, "elements", 0)
    return monkeypatch


def test_a_process_goes_over_when_it_has_merged_enough(fresh: pytest.MonkeyPatch) -> None:
    assert native.AFTER >= 1 << 28  # the default job merges half a million elements
    fresh.setattr(native, "AFTER", 1000)
    assert [native.chosen(400) for _ in range(5)] == [False, False, False, True, True]
    fresh.setenv("FEDNANO_NATIVE", "off")
    assert not native.chosen(400)
    fresh.setattr(native._Merged, "elements", 0)
    fresh.setenv("FEDNANO_NATIVE", "on")
    assert native.chosen(1)


def test_without_numba(fresh: pytest.MonkeyPatch) -> None:
    real: Any = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.split(".", maxsplit=1)[0] in ("numba", "llvmlite"):
            raise ImportError(name)
        return real(name, *rest)

    native._loops.cache_clear()
    fresh.delitem(sys.modules, "fednano.aggregation.native_loops", raising=False)
    fresh.setattr(builtins, "__import__", refuse)
    fresh.setattr(native, "AFTER", 0)
    try:
        assert not native.chosen(1)
        total = FixedSum(Grid.covering(1.0, 2), {"x": (3,)})
        total.add({"x": torch.ones(3)}, 1.0)
        assert total.value("x").tolist() == [1.0] * 3
        fresh.setenv("FEDNANO_NATIVE", "on")
        with pytest.raises(ConfigError, match=r"pip install 'fednano\[native\]'"):
            total.add({"x": torch.ones(3)}, 1.0)
    finally:
        native._loops.cache_clear()


def test_other_words_are_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("FEDNANO_NATIVE", "fast")
    with pytest.raises(ConfigError, match=r"FEDNANO_NATIVE is 'fast'; expected one of auto, off, on"):
        native.chosen(1)


def rounded_twice(ring: U64, x: np.ndarray, scaled: float, flip: np.uint64, tail: int = 0) -> float:
    """What a loop without fused multiply-add would do, from the element ``tail`` on."""
    loop = native.loop_for("add", x)
    assert loop is not None
    loop(ring[:tail], x[:tail], scaled, flip)
    ring[tail:] += (scaled * x[tail:].astype(np.float64) + MAGIC).view(np.uint64)
    return float(np.abs(x).max())


def test_a_loop_that_rounds_otherwise_is_found_out() -> None:
    loop = loop_or_skip(torch.float32)
    assert native.agrees(loop, "add", "f")
    assert not native.agrees(rounded_twice, "add", "f")
    # in the last element only, as where a library's loop leaves a rest to slower code
    assert not native.agrees(lambda r, x, s, p: rounded_twice(r, x, s, p, x.size - 1), "add", "f")


@pytest.mark.parametrize("error", [RuntimeError("no locator available"), OSError(28, "no space"), EOFError()])
def test_no_place_for_the_cache(fresh: pytest.MonkeyPatch, error: Exception) -> None:
    from fednano.aggregation import native_loops

    real = native_loops.njit

    def fail(*given: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise error
        return real(*given, **options)

    fresh.setattr(native_loops, "njit", fail)
    loop = native_loops.compiled.__wrapped__("add", "f")
    ring = np.zeros(3, np.uint64)
    assert loop(ring, np.ones(3, np.float32), 5.0, np.uint64(0)) == 1.0
    assert (ring - np.float64(MAGIC).view(np.uint64)).tolist() == [5, 5, 5]


def test_a_cache_cut_short_and_a_compiler_that_fails(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import numba

    from fednano.aggregation import native_loops

    fresh.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    fresh.setenv("FEDNANO_NATIVE", "on")
    for _ in range(2):
        total = FixedSum(Grid.covering(1.0, 2), {"x": (3,)})
        native._checked.cache_clear()
        native_loops.compiled.cache_clear()
        total.add({"x": torch.ones(3)}, 1.0)
        assert total.value("x").tolist() == [1.0] * 3
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert files
        for path in files:
            path.write_bytes(path.read_bytes()[:40])

    def fail(*given: Any, **options: Any) -> Any:
        raise ValueError("no such target")

    fresh.setattr(native_loops, "njit", fail)
    native._checked.cache_clear()
    native_loops.compiled.cache_clear()
    try:
        total.add({"x": torch.ones(3)}, 1.0)
        assert total.value("x").tolist() == [2.0] * 3
        assert "no such target" in caplog.text
    finally:
        native._checked.cache_clear()


SMALL = """
import sys, torch
from fednano.aggregation import LeafSpec, Spec, Update, create_rule
rule, spec = create_rule("fisher"), Spec({"x": LeafSpec((100, 100))})
state = rule.add(rule.init(spec), Update("a", 0, 1.0, {"x": torch.ones(100, 100)}, {"x": torch.ones(100, 100)}))
rule.finish(state)
print([name for name in ("numba", "llvmlite") if name in sys.modules])
"""


def test_a_small_merge_does_not_load_numba() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "FEDNANO_NATIVE"}
    root = str(Path(__file__).parents[2])
    out = subprocess.run(
        [sys.executable, "-P", "-c", SMALL],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "PYTHONPATH": os.pathsep.join([root, environment.get("PYTHONPATH", "")])},
    ).stdout
    assert out.strip() == "[]"
