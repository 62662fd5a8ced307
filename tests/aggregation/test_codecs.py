"""Codecs: exact lengths, error bounds, error feedback, and payloads that lie."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.aggregation import (
    LeafSpec,
    Refusal,
    Spec,
    Update,
    codec_in_round,
    codec_names,
    create_codec,
    freshen,
    staleness_weight,
)
from fednano.aggregation.codecs import decode_fisher, encode_fisher
from fednano.errors import ConfigError, TrainingDiverged

SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple)


def change_of(seed: int, shape: tuple[int, ...], scale: float, flavour: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * scale
    if flavour == "zero":
        return torch.zeros(shape)
    if flavour == "spiky":
        return x * (torch.rand(shape, generator=g) < 0.1)
    return x


def round_trip(codec: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    zero = {"v": torch.zeros(x.shape)}
    payloads, lost = codec.encode({"v": x}, zero)
    return codec.decode(payloads, zero)["v"], payloads["v"], lost


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(codec_names()),
    shape=SHAPES,
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e4]),
    flavour=st.sampled_from(["plain", "spiky", "zero"]),
)
def test_round_trip_within_its_bound(
    name: str, shape: tuple[int, ...], seed: int, scale: float, flavour: str
) -> None:
    x = change_of(seed, shape, scale, flavour)
    codec = create_codec(name)
    got, payload, lost = round_trip(codec, x)
    assert payload.dtype == torch.uint8
    assert payload.numel() == codec.nbytes(shape)
    assert got.shape == x.shape
    error = (got.double() - x.double()).abs()
    top = float(x.abs().max())
    if name == "none":
        assert torch.equal(got, x)
    elif name in ("bf16", "fp16"):
        bits, tiny = (8, 1e-38) if name == "bf16" else (11, 2.0**-25)
        assert (error <= x.double().abs() * 2.0**-bits + tiny).all()
    elif name in ("int8", "int4"):
        levels = 127 if name == "int8" else 7
        flat, wrong = x.reshape(-1), error.reshape(-1)
        for start in range(0, flat.numel(), codec.group):
            scale_of = float(flat[start : start + codec.group].abs().max()) / levels
            assert float(wrong[start : start + codec.group].max()) <= scale_of * 0.5001 + 1e-37
    elif name == "sign":
        flat, back = x.reshape(-1), got.reshape(-1)
        for start in range(0, flat.numel(), codec.group):
            mean = float(flat[start : start + codec.group].double().abs().mean())
            sent = back[start : start + codec.group].abs().double()
            assert (sent <= mean * (1 + 1e-6)).all()
            assert (sent >= mean * (1 - 2.0**-7) - 1e-40).all()  # bfloat16, cut
        assert (back * flat >= 0.0).all()
    elif name == "topk":
        keep = min(x.numel(), max(1, int(0.05 * x.numel())))
        assert int((got != 0).sum()) <= keep
        kth = x.abs().reshape(-1).sort(descending=True).values[keep - 1]
        assert float(error.max()) <= float(kth) + top * 2.0**-10 + 1e-37
        assert float(error[x.abs() > kth].max() if (x.abs() > kth).any() else 0.0) <= top * 2.0**-11 + 1e-37
    else:
        assert float(got.double().norm()) <= float(x.double().norm()) * 1.01 + 1e-30
    if codec.feedback:
        assert torch.allclose(lost["v"] + got, x, atol=top * 1e-6 + 1e-38)
    else:
        assert lost == {}


def test_dct_sends_the_strongest_columns() -> None:
    """Against scipy's transform of the dense matrix, tall and wide; a change of few frequencies comes back whole."""
    rng = np.random.default_rng(0)
    for shape in ((16, 64), (64, 16), (64,)):
        wide = (min(shape), max(shape)) if len(shape) == 2 else (1, 64)
        spectrum = np.zeros(wide)
        spectrum[:, [1, 5, 17]] = rng.normal(size=(wide[0], 3))
        matrix = scipy.fft.idct(spectrum, axis=1, norm="ortho")
        x = torch.from_numpy(
            (matrix.T if shape == (64, 16) else matrix.reshape(shape)).astype(np.float32).copy()
        )
        got, payload, _ = round_trip(create_codec("dct", keep=0.125), x)
        assert float((got - x).abs().max()) < 2e-3 * float(x.abs().max())
        assert payload.numel() == 4 * 8 + 4 + 2 * 8 * wide[0]
        few, _, _ = round_trip(create_codec("dct", keep=1.0 / 64), x)
        best = np.sort((spectrum**2).sum(0))[::-1][0]
        assert float(few.square().sum()) == pytest.approx(best, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "bound"), [("bf16", 0.5), ("fp16", 0.5), ("int8", 0.30), ("int4", 0.17), ("sign", 0.06)]
)
def test_bytes_against_float32(name: str, bound: float) -> None:
    for shape in ((2048, 32), (32, 64), (1024,)):
        assert create_codec(name).nbytes(shape) / (4 * math.prod(shape)) <= bound


@pytest.mark.parametrize("name", ["int4", "sign", "topk", "dct"])
def test_error_feedback_sends_everything_in_the_end(name: str) -> None:
    """Sum of what arrived equals the sum of what was meant, up to what the last round still carries."""
    codec = create_codec(name)
    g = torch.Generator().manual_seed(0)
    steady = torch.randn(16, 24, generator=g)
    zero = {"v": torch.zeros(16, 24)}
    carry: dict[str, torch.Tensor] = {}
    arrived, blind = torch.zeros(16, 24), torch.zeros(16, 24)
    rounds = 120
    for _ in range(rounds):
        payloads, carry = codec.encode({"v": steady}, zero, carry)
        arrived += codec.decode(payloads, zero)["v"]
        blind += codec.decode(codec.encode({"v": steady}, zero)[0], zero)["v"]
    assert torch.allclose(arrived + carry["v"], rounds * steady, atol=1e-2)
    assert (arrived / rounds - steady).norm() < 0.35 * (blind / rounds - steady).norm()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), rounds=st.integers(2, 12))
def test_the_last_round_settles_what_one_bit_a_round_has_left_out(seed: int, rounds: int) -> None:
    """The sum of what arrived is the sum of all changes, up to the error of int4 on what was left."""
    start, codec = {"v": torch.zeros(16, 24)}, create_codec("sign")
    draw = torch.Generator().manual_seed(seed)
    changes = [torch.randn(16, 24, generator=draw) for _ in range(rounds)]
    carry: dict[str, torch.Tensor] = {}
    arrived, owed = torch.zeros(16, 24), []
    for number, change in enumerate(changes, start=1):
        used = codec_in_round(codec, number, rounds)
        assert (used.name == "int4") == (number == rounds)
        payloads, carry = used.encode({"v": change}, start, carry)
        arrived += used.decode(payloads, start)["v"]
        owed.append(float((sum(changes[:number]) - arrived).norm()))
    assert owed[-1] < 0.3 * owed[-2]
    assert codec_in_round(create_codec("sign", last=""), rounds, rounds).name == "sign"
    assert codec_in_round(create_codec("int4"), rounds, rounds).name == "int4"


def test_a_last_codec_must_exist() -> None:
    with pytest.raises(ConfigError, match="last='int5'"):
        create_codec("topk", last="int5")


def test_encoding_is_of_the_change_and_keeps_the_dtype() -> None:
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        current = {"v": (100.0 * torch.randn(8, 9, generator=g)).to(dtype)}
        leaves = {"v": (current["v"].float() + 1e-3 * torch.randn(8, 9, generator=g)).to(dtype)}
        payloads, _ = create_codec("int8").encode(leaves, current)
        got = create_codec("int8").decode(payloads, current)
        assert got["v"].dtype == dtype
        if dtype != torch.bfloat16:
            assert (got["v"] - leaves["v"]).abs().max() < 5e-5
    half, _, _ = round_trip(create_codec("fp16"), torch.tensor([1e6, -1e6]))
    assert half.tolist() == [65504.0, -65504.0]


def outcome(codec: Any, payload: torch.Tensor, current: dict[str, torch.Tensor]) -> Any:
    try:
        return tuple(codec.decode({"v": payload}, current)["v"].shape)
    except Refusal as error:
        return error.reason


@pytest.mark.parametrize("name", codec_names())
def test_payloads_that_lie_are_refused(name: str) -> None:
    codec = create_codec(name)
    current = {"v": torch.zeros(12, 50)}
    payloads, _ = codec.encode({"v": torch.randn(12, 50)}, current)
    good = payloads["v"]
    for bad in (good[:-1], torch.cat([good, good[:1]]), good.to(torch.int16), good.reshape(1, -1), good[:0]):
        with pytest.raises(Refusal) as refused:
            codec.decode({"v": bad}, current)
        assert refused.value.reason == "codec"
    with pytest.raises(Refusal) as refused:
        codec.decode({"other": good}, current)
    assert refused.value.reason == "schema"
    noise = torch.randint(0, 256, good.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for junk in (torch.full_like(good, 255), noise, torch.zeros_like(good)):
        assert outcome(codec, junk, current) in ("codec", (12, 50))
    with pytest.raises(TrainingDiverged):
        codec.encode({"v": torch.full((12, 50), math.nan)}, current)


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-20, 1.0, 1e10]), shape=SHAPES)
@settings(max_examples=60, deadline=None)
def test_fisher_in_8_bits(seed: int, scale: float, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(seed)
    fisher = {"v": torch.randn(shape, generator=g).pow(4) * scale}
    payload = encode_fisher(fisher)
    assert payload["v"].numel() == fisher["v"].numel() + 4
    got = decode_fisher(payload, {"v": shape})["v"]
    top = math.sqrt(float(fisher["v"].max()))
    assert ((got.double().sqrt() - fisher["v"].double().sqrt()).abs() <= top / 509.0).all()
    assert (got >= 0.0).all()


def test_bad_fisher_payloads() -> None:
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError):
            encode_fisher({"v": torch.tensor([1.0, bad])})
    payload = encode_fisher({"v": torch.rand(5)})["v"]
    broken = payload.clone()
    broken[:4] = torch.tensor([0, 0, 192, 127], dtype=torch.uint8)  # the bytes of NaN
    for name, tensor, reason in (
        ("v", payload[:-1], "codec"),
        ("v", payload.float(), "codec"),
        ("v", broken, "codec"),
        ("w", payload, "schema"),
    ):
        with pytest.raises(Refusal) as refused:
            decode_fisher({name: tensor}, {"v": (5,)})
        assert refused.value.reason == reason
    assert decode_fisher(encode_fisher({"v": torch.zeros(3)}), {"v": (3,)})["v"].tolist() == [0.0] * 3


def test_bad_codec_options() -> None:
    for name, options in (
        ("zip", {}),
        ("int8", {"bits": 8}),
        ("int4", {"group": 7}),
        ("topk", {"density": 0.0}),
        ("dct", {"keep": 1.5}),
    ):
        with pytest.raises(ConfigError):
            create_codec(name, **options)


def test_late_updates() -> None:
    spec = Spec({"v": LeafSpec((3,))})
    old, now = {"v": torch.zeros(3)}, {"v": torch.ones(3)}
    late = Update("c", 2, 8.0, {"v": torch.tensor([0.5, 0.0, -0.5])})
    fresh = freshen(late, old, now, round=5)
    assert fresh.round == 5
    assert fresh.weight == pytest.approx(8.0 / 2.0)
    assert fresh.leaves["v"].tolist() == [1.5, 1.0, 0.5]
    assert staleness_weight(0) == 1.0
    assert staleness_weight(7, 0.0) == 1.0
    for bad in ({"round": 1}, {"round": 5, "current": {"v": torch.ones(4)}}, {"round": 5, "current": {}}):
        with pytest.raises(Refusal):
            freshen(late, old, bad.get("current", now), round=bad["round"])
    with pytest.raises(ConfigError):
        staleness_weight(-1)
    assert spec.numel == 3
