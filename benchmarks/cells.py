"""Runs of the federated job as the cells of a table: measured in a pool, written one by one, never measured twice.

A cell is settings that differ from the default job's. It runs single-threaded, in a process of its own, with the model
in that process (the same bits as through a host, which a test holds), so that as many run side by side as there are
cores. Each row is written as soon as it is there: a benchmark that is cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from results import Gate, current_commit, read_results, write_results

__all__ = ["Finished", "Table", "parser_of", "run_job", "verdict"]

Row = dict[str, Any]
Job = TypeVar("Job", bound=Hashable)


class Finished:
    """What a run left behind.

    Attributes:
        summary: its summary.
        metrics: its measurements.
        seconds: that it took.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        self.metrics: list[Row] = [
            json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        self.seconds = seconds

    @property
    def accuracy(self) -> float:
        """Of the federated adapters on the test set."""
        return float(self.summary["accuracy"]["federated"])


def run_job(**settings: Any) -> Finished:
    """Run the federated job once in this process, in a folder that is gone afterwards.

    Args:
        settings: of `RunConfig`, where they differ from the default job's.
    """
    import torch

    from fednano.federation.config import RunConfig
    from fednano.federation.simulation import simulate
    from fednano.runs import make_view

    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # No deadlines: what a run gives must not depend on how busy the machine is.
        patient = {"round_timeout": 1e6, "join_timeout": 1e6}
        config = RunConfig(
            **{"placement": "local", "evaluate_every": 0, "runs_dir": folder, **patient, **settings}
        )
        path = simulate(config, backend="inprocess", view=make_view("quiet"))
        return Finished(path, time.monotonic() - began)


class Table:
    """The rows of a results file.

    Args:
        path: the file; rows that it holds already are kept.
        key: a row's cell, equal to the job that measures it.
        order: sorts rows.
        gates: promises, from all rows.
    """

    def __init__(
        self,
        path: Path,
        *,
        key: Callable[[Mapping[str, Any]], Hashable],
        order: Callable[[Mapping[str, Any]], Any],
        gates: Callable[[Sequence[Mapping[str, Any]]], list[Gate]],
    ) -> None:
        self.path, self._key, self._order, self._gates = path, key, order, gates
        self.rows: list[Row] = read_results(path)["rows"] if path.exists() else []

    def work_off(
        self,
        jobs: Iterable[Job],
        measure: Callable[[Job], Row],
        *,
        at_a_time: int,
        line: Callable[[Mapping[str, Any]], str],
    ) -> None:
        """Measure the jobs that have no row yet, and write each row when it is there.

        A job that fails does not take the others' rows with it: they are written first.

        Args:
            jobs: hashable and picklable.
            measure: a function of a module, called in a process of its own.
            at_a_time: how many run side by side.
            line: what to print of a row.
        """
        there = {self._key(row) for row in self.rows}
        todo = [job for job in jobs if job not in there]
        with ProcessPoolExecutor(at_a_time, mp_context=get_context("spawn")) as pool:
            for future in as_completed([pool.submit(measure, job) for job in todo]):
                row = {"commit": current_commit(), **future.result()}
                self.rows.append(row)
                self.rows.sort(key=self._order)
                print(line(row), flush=True)
                write_results(
                    self.path, rows=self.rows, gates=self.gates(), hardware={"runs_at_a_time": at_a_time}
                )

    def gates(self) -> list[Gate]:
        """The promises, from the rows that are there."""
        return self._gates(self.rows)


def parser_of(description: str | None, results: Path) -> argparse.ArgumentParser:
    """The options that all tables of runs have: ``--seeds``, ``--jobs``, ``--json``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--json", type=Path, default=results)
    return parser


def verdict(gates: Sequence[Gate]) -> int:
    """Print the promises that are not kept; the exit status."""
    missed = [gate for gate in gates if not gate.met]
    for gate in missed:
        print(f"MISSED {gate.name}: {gate.value:.4f} {gate.sense} {gate.bound:.4f}")
    return 1 if missed else 0
