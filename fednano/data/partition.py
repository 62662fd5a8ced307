"""Dividing one data set among clients, through the partitioners of flwr-datasets.

``dirichlet``: for each label, the shares of the clients are drawn from a symmetric Dirichlet distribution
(Yurochkin et al. 2019, arXiv:1905.12022). Small alpha gives each client few labels; large alpha approaches
equal shares. ``iid``: a random permutation, cut into equal parts. ``linear``, ``square``, ``exponential``: the same
with parts whose sizes grow so with the number of the client. ``column``: the values of a column are the clients; where
there are more values than clients, each client gets several.

Only labels and row numbers pass through flwr-datasets, as an Arrow table in memory: no file is written,
nothing is downloaded, and its usage reporting, which belongs to ``FederatedDataset``, is not reached.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
import sys
import threading
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fednano.errors import DataError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["KINDS", "PartitionSummary", "partition", "split_holdout", "summarise_partition"]

KINDS = ("dirichlet", "iid", "column", "linear", "square", "exponential")
ALPHA = (1e-6, 1e6)  # beyond these the Gamma draws behind a Dirichlet draw underflow or overflow
_import_lock = threading.RLock()


def partition(
    labels: Sequence[str | int],
    *,
    kind: str = "dirichlet",
    clients: int = 5,
    alpha: float = 0.3,
    seed: int = 0,
    min_samples: int = 1,
) -> list[list[int]]:
    """Divide samples among clients. The same arguments give the same division.

    Args:
        labels: the label of each sample, ``(n,)``; for ``column`` the value to divide by.
        kind: one of `KINDS`.
        clients: number of parts, from 1 to ``n``.
        alpha: concentration of the Dirichlet distribution, in [1e-6, 1e6]. Not used by ``iid``.
        seed: seed of the draw, not negative.
        min_samples: fewest samples that a client may get. The Dirichlet draw is repeated up to ten times to
            reach it.

    Returns:
        One list of row numbers for each client, in random order. Every row number in ``[0, n)`` occurs
        exactly once.

    Raises:
        DataError: an argument is out of its range, there are more clients than samples, or some client gets
            fewer than ``min_samples`` (so also: an empty part).
    """
    import numpy as np

    count = len(labels)
    _check(kind, count, clients=clients, alpha=alpha, seed=seed, min_samples=min_samples)
    names = sorted(set(labels), key=lambda label: (str(type(label)), label))
    code = {label: number for number, label in enumerate(names)}
    codes = np.fromiter((code[label] for label in labels), dtype=np.int64, count=count)
    if kind == "column":
        return _by_column([str(name) for name in names], codes, clients, seed, min_samples)
    if kind != "dirichlet":
        # These partitioners cut the table as it lies, so the rows are shuffled before.
        order = np.random.default_rng(seed).permutation(count)
        return _by_size(kind, codes, order, clients, min_samples)

    def draw(least: int) -> list[list[int]]:
        partitioner = _partitioners().DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=float(alpha),
            min_partition_size=least,
            self_balancing=False,
            shuffle=True,
            seed=seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one warning for each repeated draw; the outcome is judged below
            return _parts(partitioner, codes, np.arange(count))

    try:
        return draw(min_samples)
    except ValueError:
        # flwr-datasets gave up after its ten repetitions. Its first draw shows the user which clients came
        # out short.
        first = [len(part) for part in draw(0)]
    short = [(client, size) for client, size in enumerate(first) if size < min_samples]
    listed = ", ".join(f"client {client} ({size})" for client, size in short[:10]) + (
        ", ..." if short[10:] else ""
    )
    what = "an empty partition" if min_samples == 1 else f"fewer than min_samples = {min_samples} samples"
    raise DataError(
        f"Dividing {count} samples among {clients} clients with alpha = {alpha:g} left some of them with {what} "
        f"in each of ten draws; in the first: {listed}. Raise alpha (now {alpha:g}), lower min_samples "
        f"(now {min_samples}, at least 1), or ask for fewer clients (now {clients})."
    )


def split_holdout(indices: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Set aside part of a client's samples, to evaluate on what it did not train on.

    Args:
        indices: row numbers of the client, ``(n,)``, ``n >= 1``.
        fraction: share to set aside, in ``[0, 1)``. The number is rounded to the nearest; at least one sample
            stays for training, and at least one is set aside when ``fraction > 0`` and ``n >= 2``.
        seed: seed of the choice.

    Returns:
        ``(train, holdout)``: together exactly ``indices``, both in the order of ``indices``.

    Raises:
        DataError: ``fraction`` is out of its range, or ``indices`` is empty.
    """
    import numpy as np

    if not (math.isfinite(fraction) and 0 <= fraction < 1):
        raise DataError(f"holdout fraction must lie in [0, 1), got {fraction!r}. Use for instance 0.1.")
    if not indices:
        raise DataError(
            "Cannot split a holdout off a client without samples. Make the partition with min_samples >= 1."
        )
    count = len(indices)
    held = 0 if fraction == 0 else min(count - 1, max(1, round(count * fraction)))
    chosen = set(np.random.default_rng(seed).permutation(count)[:held].tolist())
    train = [index for place, index in enumerate(indices) if place not in chosen]
    return train, [index for place, index in enumerate(indices) if place in chosen]


@dataclass(frozen=True)
class PartitionSummary:
    """How many samples of each label each client has: the content of ``partition.json``.

    Attributes:
        kind: ``"dirichlet"`` or ``"iid"``.
        alpha: concentration, or None for ``iid``.
        seed: seed of the draw.
        labels: label names, ``(L,)``.
        counts: client name -> samples of each label, ``(L,)``.
    """

    kind: str
    alpha: float | None
    seed: int
    labels: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]

    @property
    def samples(self) -> dict[str, int]:
        """Samples of each client."""
        return {client: sum(row) for client, row in self.counts.items()}

    def to_json(self) -> dict[str, Any]:
        """The object that ``partition.json`` holds."""
        return {
            "kind": self.kind,
            "alpha": self.alpha,
            "seed": self.seed,
            "labels": list(self.labels),
            "counts": {client: list(row) for client, row in self.counts.items()},
        }


def summarise_partition(
    parts: Sequence[Sequence[int]],
    labels: Sequence[str | int],
    *,
    kind: str,
    alpha: float | None,
    seed: int,
    clients: Sequence[str] | None = None,
) -> PartitionSummary:
    """Count labels per client.

    Args:
        parts: row numbers of each client, as ``partition`` returns them.
        labels: the label of each sample, ``(n,)``.
        kind: how the division was made.
        alpha: concentration; kept only for ``dirichlet``.
        seed: seed of the draw.
        clients: names of the clients, one for each part; ``"0"``, ``"1"``, ... by default.
    """
    names = sorted({str(label) for label in labels})
    column = {name: number for number, name in enumerate(names)}
    counts: dict[str, tuple[int, ...]] = {}
    who = [str(number) for number in range(len(parts))] if clients is None else clients
    for client, rows in zip(who, parts, strict=True):
        row = [0] * len(names)
        for index in rows:
            row[column[str(labels[index])]] += 1
        counts[client] = tuple(row)
    return PartitionSummary(kind, alpha if kind == "dirichlet" else None, seed, tuple(names), counts)


def _check(kind: str, count: int, *, clients: int, alpha: float, seed: int, min_samples: int) -> None:
    if kind not in KINDS:
        raise DataError(f"Unknown partition kind {kind!r}; expected one of {', '.join(KINDS)}.")
    for name, value, least in (("clients", clients, 1), ("seed", seed, 0), ("min_samples", min_samples, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(
                f"{name} must be a whole number of at least {least}, got {value!r}. Correct the setting."
            )
    if kind == "dirichlet" and not (
        isinstance(alpha, int | float) and not isinstance(alpha, bool) and ALPHA[0] <= alpha <= ALPHA[1]
    ):
        raise DataError(
            f"alpha must be a positive number between {ALPHA[0]:g} and {ALPHA[1]:g}, got {alpha!r}. "
            "Use for instance 0.3 for strong label skew, 100 for almost none."
        )
    if clients > count:
        raise DataError(
            f"There are more clients ({clients}) than samples ({count}). Ask for at most {count} clients, or "
            "bring more data."
        )
    if clients * min_samples > count:
        raise DataError(
            f"{clients} clients with at least {min_samples} samples each need {clients * min_samples} "
            f"samples; there are {count}. "
            "Lower min_samples or the number of clients."
        )


def _by_size(kind: str, codes: Any, order: Any, clients: int, least: int) -> list[list[int]]:
    """Shuffled rows ``order`` (n,), cut into equal or growing parts."""
    found = _partitioners()
    types = {
        "iid": found.IidPartitioner,
        "linear": found.LinearPartitioner,
        "square": found.SquarePartitioner,
        "exponential": found.ExponentialPartitioner,
    }
    try:
        parts = _parts(types[kind](num_partitions=clients), codes, order)
    except ValueError:  # flwr-datasets refuses a part of size 0
        parts = [[]]
    smallest = min(len(part) for part in parts)
    if smallest < least:
        raise DataError(
            f"Dividing {len(order)} samples among {clients} clients with {kind} sizes leaves the smallest client "
            f"{smallest} samples, and each needs {least}. Ask for fewer clients, or for partition 'linear' or 'iid'."
        )
    return parts


def _by_column(names: list[str], codes: Any, clients: int, seed: int, least: int) -> list[list[int]]:
    """Rows by the value of a column, codes (n,) into ``names``; values are dealt to clients in their order."""
    import numpy as np

    if len(names) < clients:
        listed = ", ".join(names[:10])
        raise DataError(
            f"the column to divide by has {len(names)} values ({listed}), and there are to be {clients} clients. "
            f"Set clients to {len(names)} or fewer."
        )
    order = np.random.default_rng(seed).permutation(len(codes))
    parts = _parts(_partitioners().NaturalIdPartitioner(partition_by="label"), codes % clients, order)
    for client, part in enumerate(parts):
        if len(part) < least:
            own = ", ".join(names[client::clients])
            raise DataError(
                f"client {client} ({own}) has {len(part)} samples, and each needs {least}. Ask for fewer clients, or "
                "leave those rows out."
            )
    return parts


def _parts(partitioner: Any, codes: np.ndarray[Any, np.dtype[np.int64]], order: Any) -> list[list[int]]:
    """Run a partitioner of flwr-datasets over labels ``codes`` (n,), rows laid in ``order`` (n,)."""
    from datasets import Dataset

    # In Arrow format a column is handed out as a whole; the default format would iterate in Python, 100 times
    # slower.
    table = Dataset.from_dict({"row": order, "label": codes[order]}).with_format("arrow")
    partitioner.dataset = table
    with redirect_stderr(io.StringIO()):  # one of them draws a progress bar
        return [
            partitioner.load_partition(client)[:].column("row").to_pylist()
            for client in range(partitioner.num_partitions)
        ]


def _partitioners() -> Any:
    """The module ``flwr_datasets.partitioner``, without the plotting libraries that its package imports.

    ``flwr_datasets/__init__.py`` imports matplotlib and seaborn: 2.5 s that every client process would pay
    for nothing. A bare package object stands in for it while the partitioners are imported, and is taken away
    again, so that a later ``import flwr_datasets`` by anybody works as ever.
    """
    with _import_lock:
        loaded = sys.modules.get("fednano.data._flwr_partitioner")
        if loaded is None:
            if "flwr_datasets" in sys.modules:
                loaded = importlib.import_module("flwr_datasets.partitioner")
            else:
                with _bare_package("flwr_datasets"):
                    loaded = importlib.import_module("flwr_datasets.partitioner")
            sys.modules["fednano.data._flwr_partitioner"] = loaded
    return loaded


@contextmanager
def _bare_package(name: str) -> Iterator[None]:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise DataError(f"Partitioning needs the package {name}. Install it: pip install flwr-datasets")
    bare = types.ModuleType(name)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = bare
    try:
        yield
    finally:
        for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[key]
