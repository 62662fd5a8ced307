from __future__ import annotations

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.errors import TrainingDiverged, UpdateRefused
from fednano.federation.config import RunConfig
from fednano.federation.messages import (
    HostTicket,
    Instruction,
    Reply,
    decode_tensors,
    encode_tensors,
    record_bytes,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64]


@settings(deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_tensors_survive_to_the_bit(shapes: list[list[int]], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"leaf.{i}": (torch.randn(shape, generator=generator) * 50).to(dtype)
        for i, shape in enumerate(shapes)
    }
    back = decode_tensors(encode_tensors(tensors))
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_bytes_are_payload_plus_a_small_header() -> None:
    leaves = {"image.A": torch.randn(160, 16), "image.B": torch.randn(16, 160)}
    payload = sum(leaf.nbytes for leaf in leaves.values())
    counted = record_bytes(RecordDict({"leaves": encode_tensors(leaves)}))
    assert payload < counted < payload + 1500


def test_instruction_round_trip() -> None:
    instruction = Instruction(
        RunConfig(rounds=3, seed=7),
        "federated",
        2,
        HostTicket("127.0.0.1:1", b"\x00token\xff", b"", "abc"),
        True,
        {"fisher": True, "proximal_mu": 0.1},
        {"image.A": torch.arange(6.0).reshape(2, 3)},
    )
    back = Instruction.from_records(instruction.to_records())
    assert torch.equal(back.leaves.pop("image.A"), instruction.leaves.pop("image.A"))
    assert back == instruction


def test_failed_reply_carries_its_reason() -> None:
    reply = Reply.failed("client-001", 4, TrainingDiverged("the loss is nan"))
    back = Reply.from_records(reply.to_records())
    assert back.failure is not None
    assert (back.failure.kind, back.failure.message, back.client) == (
        "TrainingDiverged",
        "the loss is nan",
        "client-001",
    )
    assert back.leaves is None


@pytest.mark.parametrize(
    "record",
    [
        ArrayRecord({"other": Array(dtype="uint8", shape=(1,), stype="fednano.safetensors", data=b"x")}),
        ArrayRecord({"tensors": Array(dtype="uint8", shape=(1,), stype="numpy.ndarray", data=b"x")}),
        ArrayRecord({"tensors": Array(dtype="uint8", shape=(3,), stype="fednano.safetensors", data=b"xyz")}),
        ArrayRecord(
            {"tensors": Array(dtype="uint8", shape=(9,), stype="fednano.safetensors", data=b"\xff" * 9)}
        ),
    ],
)
def test_foreign_arrays_are_refused(record: ArrayRecord) -> None:
    with pytest.raises(UpdateRefused):
        decode_tensors(record)


def test_reply_without_head_is_refused() -> None:
    with pytest.raises(UpdateRefused, match="lacks"):
        Reply.from_records(RecordDict({"facts": ConfigRecord({})}))
