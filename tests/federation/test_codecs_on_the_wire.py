"""Uplink codecs in rounds: bytes as Flower serialises them, errors that stay with the client, one Fisher in 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fednano.aggregation import codec_names
from fednano.errors import ConfigError
from fednano.federation.client_state import ClientState
from fednano.federation.rounds import Federation, PhaseResult

STEADY = {"sign": 'last=""'}
"""Options with which every round is alike."""
RATIOS = {"bf16": 0.53, "fp16": 0.53, "int8": 0.30, "int4": 0.17, "sign": 0.06, "topk": 0.16, "dct": 0.16}


def up(result: PhaseResult) -> float:
    return result.wire.adapter_up / result.wire.updates


@pytest.fixture(scope="module")
def wide(laboratory: Any) -> Any:
    """Adapters of the default size, behind the same model."""
    lab = type(laboratory)(laboratory.settings | {"rank": 16})
    yield lab
    lab.grid.close()


def test_every_codec_is_an_option() -> None:
    assert set(RATIOS) | {"none"} == set(codec_names())


def test_bytes_and_results(wide: Any) -> None:
    plain = wide.rounds()
    for codec, ratio in RATIOS.items():
        result = wide.rounds(codec=codec, codec_options=STEADY.get(codec, ""))
        assert up(result) <= ratio * up(plain), codec
        assert result.wire.adapter_down == plain.wire.adapter_down
        # Cosine of the encoded run's change with the plain one's: the sparser ones send a few entries a round.
        pairs = [
            torch.cat([(r.leaves[name] - wide.start[name]).flatten().double() for name in wide.start])
            for r in (plain, result)
        ]
        cosine = float(torch.nn.functional.cosine_similarity(*pairs, dim=0))
        assert cosine > {"bf16": 0.999, "fp16": 0.999, "int8": 0.999, "int4": 0.95}.get(codec, 0.2), codec


def test_the_last_round_of_sign_is_int4_and_owes_little(wide: Any) -> None:
    owed, sent = [], []
    for options in ("", STEADY["sign"]):
        fed = wide.federation(codec="sign", codec_options=options, rounds=2, samples=16)
        sent.append(up(wide.rounds(fed=fed)))
        carried = [leaf for path in memories(fed, 2) for leaf in load_file(path).values()]
        owed.append(float(torch.cat([leaf.flatten() for leaf in carried]).norm()))
    assert owed[0] < 0.4 * owed[1]
    assert sent[0] - sent[1] == pytest.approx(10_240 * (4.25 - 1.0625) / 8 / 2, rel=0.05)  # one round in two


def test_the_fisher_travels_as_bytes(wide: Any) -> None:
    plain, coded = wide.rounds("fisher"), wide.rounds("fisher", codec="int8")
    assert up(coded) < 0.30 * up(plain)
    for name, leaf in plain.leaves.items():
        assert float((coded.leaves[name] - leaf).norm() / leaf.norm()) < 0.05


def memories(fed: Federation, number: int) -> list[Path]:
    states = (ClientState(Path(fed.config.cache_dir), fed.folder.id, "federated", name) for name in fed.nodes)
    return [state.folder / f"round-{number:04d}.safetensors" for state in states]


def test_what_was_lost_stays_with_the_client_and_comes_again(laboratory: Any) -> None:
    fed = laboratory.federation(codec="sign")
    result = laboratory.rounds(fed=fed)
    for path in memories(fed, 2):
        lost = load_file(path)
        assert {name.removeprefix("carry/") for name in lost} == set(laboratory.start)
        assert all(float(tensor.abs().max()) > 0 for tensor in lost.values())
    without = laboratory.rounds(codec="sign", codec_options="feedback=false")
    assert not torch.equal(result.leaves["text.B"], without.leaves["text.B"])
    plain = laboratory.federation()
    laboratory.rounds(fed=plain)
    assert not any(path.exists() for path in memories(plain, 2))  # nothing is kept that nobody needs


def test_a_client_that_lost_its_memory_is_left_out(laboratory: Any) -> None:
    fed = laboratory.federation(codec="sign", rounds=1)
    first = laboratory.rounds(fed=fed)
    memories(fed, 1)[1].unlink()
    more = laboratory.federation(codec="sign")
    object.__setattr__(more, "folder", fed.folder)
    result = laboratory.rounds(fed=more, upto=first)
    assert result.accepted == {"client-000": 2, "client-001": 1, "client-002": 2}
    (row,) = [row for row in fed.folder.metrics() if "refused" in row]
    assert "memory of round 1" in row["refused"]


def test_summary_counts_the_encoded_bytes(run: Any) -> None:
    small = {"samples": 4, "batch_size": 4, "final_samples": 4, "rank": 16, "rounds": 1}
    plain, coded = (
        json.loads((run(codec=codec, **small) / "summary.json").read_text())["bytes"]
        for codec in ("fp32", "int8")
    )
    assert coded["adapter_up_per_client_round"] <= 0.30 * plain["adapter_up_per_client_round"]
    assert coded["adapter_down_per_client_round"] == plain["adapter_down_per_client_round"]


def test_impossible_combinations_are_refused_at_start(laboratory: Any) -> None:
    for rule, codec, reason in (
        ("scaffold", "int4", "control variates"),
        ("flora", "sign", "fresh factors"),
        ("ties", "sign", "one bit has none"),
        ("median", "topk", "no change at all"),
    ):
        with pytest.raises(ConfigError, match=reason):
            laboratory.rounds(rule, codec=codec)
    with pytest.raises(ConfigError, match="no option densty"):
        laboratory.rounds(codec="topk", codec_options="densty=1")
    with pytest.raises(ConfigError, match="has no options"):
        laboratory.rounds(codec_options="density=1")
