"""Division among clients: exact cover, repeatability, the distribution it claims, clear refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fednano.data import load_easy_vqa, partition, split_holdout, summarise_partition
from fednano.data import partition as partition_function
from fednano.errors import DataError

LABELS = ["yes"] * 120 + ["no"] * 90 + ["red"] * 40


@settings(max_examples=25, deadline=None)
@given(
    labels=st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=120),
    clients=st.integers(1, 8),
    alpha=st.floats(0.05, 100),
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["dirichlet", "iid"]),
)
def test_every_index_exactly_once_and_repeatable(
    labels: list[str], clients: int, alpha: float, seed: int, kind: str
) -> None:
    refusal = None
    try:
        parts = partition(labels, kind=kind, clients=clients, alpha=alpha, seed=seed)
    except DataError as error:
        refusal = str(error)
    if refusal is not None:
        assert ("more clients" in refusal) == (clients > len(labels))
        assert clients > len(labels) or (kind == "dirichlet" and "Raise alpha" in refusal)
        return
    assert len(parts) == clients
    assert all(parts)
    assert sorted(index for part in parts for index in part) == list(range(len(labels)))
    assert all(type(index) is int for part in parts for index in part)
    assert parts == partition(labels, kind=kind, clients=clients, alpha=alpha, seed=seed)


def test_seed_and_order_matter() -> None:
    assert partition(LABELS, seed=0) != partition(LABELS, seed=1)
    assert partition(LABELS, kind="iid", seed=0) != partition(LABELS, kind="iid", seed=1)
    # rows are in random order within a client: a client that reads its first 300 must not get one label only
    part = partition(LABELS, kind="iid", clients=1)[0]
    assert part != sorted(part)
    part = partition(LABELS, clients=1)[0]
    assert part != sorted(part)


def test_iid_parts_are_of_equal_size() -> None:
    sizes = [len(part) for part in partition(LABELS, kind="iid", clients=7)]
    assert max(sizes) - min(sizes) <= 1


def test_agrees_with_flwr_datasets_used_in_its_default_way() -> None:
    """The Arrow shortcut must give what the partitioner gives over a plain data set."""
    from datasets import Dataset

    from fednano.data.partition import _partitioners

    labels = load_easy_vqa("test").labels[:2000]
    names = sorted(set(labels))
    plain = Dataset.from_dict({"row": list(range(len(labels))), "label": [names.index(x) for x in labels]})
    reference = _partitioners().DirichletPartitioner(
        num_partitions=4, partition_by="label", alpha=0.3, min_partition_size=5, seed=3
    )
    reference.dataset = plain
    expected = [list(reference.load_partition(k)["row"]) for k in range(4)]
    assert partition(labels, clients=4, alpha=0.3, seed=3, min_samples=5) == expected


def test_shares_follow_the_dirichlet_distribution() -> None:
    """One client's share of a label is Beta(alpha, alpha (K - 1)); Kolmogorov-Smirnov over 240 independent shares."""
    alpha, clients, size = 0.5, 4, 200
    labels = np.repeat(np.arange(10), size).tolist()
    shares = []
    for seed in range(24):
        part = partition(labels, clients=clients, alpha=alpha, seed=seed)[0]
        shares += list(np.bincount(np.array(labels)[part], minlength=10) / size)
    # counts are whole numbers: spread each over its own 1/size, which floors undo
    jitter = np.random.default_rng(0).uniform(0, 1 / size, len(shares))
    result = stats.kstest(
        np.clip(np.array(shares) + jitter, 0, 1), stats.beta(alpha, alpha * (clients - 1)).cdf
    )
    assert result.pvalue > 1e-3
    # and the test can fail: it tells another alpha apart
    wrong = stats.kstest(np.array(shares) + jitter, stats.beta(2.0, 6.0).cdf)
    assert wrong.pvalue < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clients": 0}, "clients must be a whole number of at least 1, got 0"),
        ({"clients": -2}, "clients must be"),
        ({"clients": 2.0}, "clients must be"),
        ({"clients": True}, "clients must be"),
        ({"clients": 251}, r"more clients \(251\) than samples \(250\)"),
        ({"alpha": 0}, "alpha must be a positive number .* got 0"),
        ({"alpha": -0.3}, "alpha must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"alpha": float("inf")}, "alpha must be"),
        ({"alpha": "0.3"}, "alpha must be"),
        ({"kind": "pathological"}, "Unknown partition kind 'pathological'; expected one of dirichlet, iid"),
        ({"seed": -1}, "seed must be"),
        ({"min_samples": 0}, "min_samples must be"),
        ({"min_samples": 51}, "need 255 samples; there are 250"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        partition(LABELS, **arguments)  # type: ignore[arg-type]


def test_no_samples_at_all() -> None:
    with pytest.raises(DataError, match="more clients"):
        partition([], clients=1)


def test_an_empty_partition_names_the_clients_and_the_remedy() -> None:
    with pytest.raises(DataError) as caught:
        partition(["a", "a", "b", "b"] * 3, clients=8, alpha=0.01, seed=0)
    text = str(caught.value)
    assert "an empty partition" in text
    named = re.findall(r"client (\d+) \(0\)", text)
    assert named
    assert all(0 <= int(client) < 8 for client in named)
    assert "Raise alpha (now 0.01)" in text
    with pytest.raises(DataError, match="fewer than min_samples = 40"):
        partition(LABELS, clients=5, alpha=0.1, min_samples=40)


def test_min_samples_is_kept() -> None:
    parts = partition(LABELS, clients=3, alpha=0.3, seed=5, min_samples=20)
    assert min(len(part) for part in parts) >= 20


@settings(max_examples=60, deadline=None)
@given(
    indices=st.lists(st.integers(0, 10**6), min_size=1, max_size=60, unique=True),
    fraction=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 1000),
)
def test_holdout(indices: list[int], fraction: float, seed: int) -> None:
    train, held = split_holdout(indices, fraction, seed)
    assert sorted(train + held) == sorted(indices)
    assert train == [i for i in indices if i in set(train)]
    assert held == [i for i in indices if i in set(held)]
    assert len(train) >= 1
    if fraction == 0:
        assert held == []
    elif len(indices) >= 2:
        assert abs(len(held) - fraction * len(indices)) <= 1
        assert len(held) >= 1
    assert (train, held) == split_holdout(indices, fraction, seed)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan"), float("inf")])
def test_holdout_refusals(fraction: float) -> None:
    with pytest.raises(DataError, match=r"must lie in \[0, 1\)"):
        split_holdout([1, 2], fraction, 0)
    with pytest.raises(DataError, match="without samples"):
        split_holdout([], 0.1, 0)


def test_summary_counts() -> None:
    parts = partition(LABELS, clients=3, seed=2, alpha=1.0)
    summary = summarise_partition(parts, LABELS, kind="dirichlet", alpha=1.0, seed=2)
    content = summary.to_json()
    assert content["labels"] == ["no", "red", "yes"]
    assert [sum(column) for column in zip(*content["counts"].values(), strict=True)] == [90, 40, 120]
    assert summary.samples == {str(k): len(part) for k, part in enumerate(parts)}
    named = summarise_partition(parts, LABELS, kind="iid", alpha=1.0, seed=2, clients=["x", "y", "z"])
    assert list(named.counts) == ["x", "y", "z"]
    assert named.alpha is None


PROGRAM = """
import socket, sys
def refuse(*a, **k): raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from fednano.data import partition
labels = ["a", "b", "c"] * 30
parts = partition(labels, clients=5, alpha=0.5)
assert sum(map(len, parts)) == 90
for name in ("matplotlib", "seaborn", "torch", "flwr", "flwr_datasets"):
    assert name not in sys.modules, name
"""


def run_alone(program: str, home: Path) -> None:
    """Run in a process of its own, with warnings as errors and every connection an error."""
    clean = {**os.environ, "HOME": str(home), "HF_HOME": str(home / "hf"), "MPLCONFIGDIR": str(home / "mpl")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=clean,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "%" not in done.stderr  # no progress bar
    assert not list((home / "hf").rglob("*"))


def test_no_network_no_files_no_plotting(tmp_path: Path) -> None:
    run_alone(PROGRAM, tmp_path)


@pytest.mark.slow
def test_flwr_datasets_can_be_imported_afterwards(tmp_path: Path) -> None:
    after = """
import flwr_datasets
assert flwr_datasets.FederatedDataset and "seaborn" in sys.modules
assert partition(labels, clients=5, alpha=0.5) == parts
"""
    run_alone(PROGRAM + after, tmp_path)


def test_the_name_partition_is_the_function() -> None:
    """The package's module of the same name must not hide it."""
    assert callable(partition_function)
