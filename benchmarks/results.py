"""The one writer of ``benchmarks/results/*.json``.

Every results file has one shape::

    {"name", "commit", "date", "hardware", "versions", "command",
     "rows":  [{column: number | string | bool | null | list | object, ...}, ...],
     "gates": [{"name", "value", "bound", "sense": "<=" | ">=", "met"}, ...]}

``name`` is the stem of the file. A gate is one number that was promised, next to the bound it was promised
against; ``met`` follows from the other three and is never an input. A missed gate is written as missed.
NaN and infinity are refused, because they are not JSON and because they are not measurements.

A benchmark ends with::

    write_results(path, rows=rows, gates=[Gate("k1_forward", 1.18, 1.25, "<=")])
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Sense = Literal["<=", ">="]
Row = Mapping[str, Any]

KEYS = ("name", "commit", "date", "hardware", "versions", "command", "rows", "gates")
GATE_KEYS = ("name", "value", "bound", "sense", "met")
PACKAGES = ("torch", "triton", "transformers", "flwr", "peft", "grpcio", "numpy", "numba", "liger-kernel")


class ResultsError(ValueError):
    """A results document does not have the one agreed shape."""


@dataclass(frozen=True)
class Gate:
    """One promised number: ``value`` was measured, ``bound`` was promised.

    Raises:
        ResultsError: a name is empty, a number is not finite, or the sense is neither ``<=`` nor ``>=``.
    """

    name: str
    value: float
    bound: float
    sense: Sense

    def __post_init__(self) -> None:
        if not self.name:
            raise ResultsError("a gate has an empty name; name it after what it measures")
        if self.sense not in get_args(Sense):
            raise ResultsError(f"gate {self.name!r} has sense {self.sense!r}; expected '<=' or '>='")
        for field in ("value", "bound"):
            number = getattr(self, field)
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ResultsError(f"gate {self.name!r} has {field} {number!r}; expected a finite number")

    @property
    def met(self) -> bool:
        """Whether the measured value keeps the promise."""
        return self.value <= self.bound if self.sense == "<=" else self.value >= self.bound

    def as_dict(self) -> dict[str, Any]:
        """The gate as it stands in the file."""
        return {
            "name": self.name,
            "value": self.value,
            "bound": self.bound,
            "sense": self.sense,
            "met": self.met,
        }


def current_commit(root: Path | None = None) -> str:
    """The checked-out commit, with ``+`` behind it when tracked files differ from it.

    The variable ``FEDNANO_COMMIT`` wins: it names the commit where a copy without its history is measured.
    Returns ``"unknown"`` where neither says.
    """
    if named := os.environ.get("FEDNANO_COMMIT"):
        return named
    where = root or Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(where), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe_hardware() -> dict[str, Any]:
    """Processor, cores, memory and accelerators of this machine, without names that identify it."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    import torch

    found["gpus"] = [
        {
            "name": torch.cuda.get_device_name(i),
            "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
        }
        for i in range(torch.cuda.device_count())
    ]
    return found


def describe_versions(extra: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python and of the installed packages that bear on the numbers."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *extra):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_command() -> str:
    """The command line of this process; absolute paths are cut to their last part."""
    words = [Path(sys.executable).name, *sys.orig_argv[1:]]
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in words)


def _check_finite(value: Any, where: str) -> None:
    if value is None or isinstance(value, (str, bool, int)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ResultsError(
                f"{where} is {value}; a results file holds finite numbers, or null if not measured"
            )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ResultsError(f"{where} has the key {key!r}; expected a string")
            _check_finite(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_finite(item, f"{where}[{index}]")
    else:
        raise ResultsError(
            f"{where} is a {type(value).__name__}; expected what JSON can hold (convert tensors with .item())"
        )


def validate(document: Mapping[str, Any], *, stem: str | None = None) -> None:
    """Check that ``document`` has the agreed shape.

    Args:
        document: the parsed file.
        stem: the file's stem, if the document belongs to one; ``name`` must equal it.

    Raises:
        ResultsError: says which part is wrong and what was expected.
    """
    if set(document) != set(KEYS):
        missing, unknown = sorted(set(KEYS) - set(document)), sorted(set(document) - set(KEYS))
        raise ResultsError(f"expected the keys {list(KEYS)}; missing {missing}, unknown {unknown}")
    kinds: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("name", "commit", "date", "command"), str),
        **dict.fromkeys(("hardware", "versions"), Mapping),
        **dict.fromkeys(("rows", "gates"), (list, tuple)),
    }
    for key, kind in kinds.items():
        if not isinstance(document[key], kind) or (kind is str and not document[key]):
            raise ResultsError(f"{key!r} is {document[key]!r}; expected a non-empty string, object or list")
    if stem is not None and document["name"] != stem:
        raise ResultsError(f"name is {document['name']!r}; expected {stem!r}, the stem of the file")
    try:
        datetime.datetime.fromisoformat(document["date"])
    except ValueError as error:
        raise ResultsError(f"date is {document['date']!r}; expected ISO 8601") from error
    for index, row in enumerate(document["rows"]):
        if not isinstance(row, Mapping) or not row:
            raise ResultsError(f"rows[{index}] is {row!r}; expected a non-empty object")
    seen: set[str] = set()
    for index, entry in enumerate(document["gates"]):
        if not isinstance(entry, Mapping) or set(entry) != set(GATE_KEYS):
            raise ResultsError(f"gates[{index}] is {entry!r}; expected exactly the keys {list(GATE_KEYS)}")
        gate = Gate(entry["name"], entry["value"], entry["bound"], entry["sense"])
        if entry["met"] is not gate.met:
            raise ResultsError(
                f"gate {gate.name!r} says met={entry['met']!r}, "
                f"but {gate.value} {gate.sense} {gate.bound} is {gate.met}"
            )
        if gate.name in seen:
            raise ResultsError(f"gate {gate.name!r} appears twice; gates are looked up by name")
        seen.add(gate.name)
    _check_finite(dict(document), "results")


def judge_again(path: str | os.PathLike[str], gates: Callable[[Sequence[Row]], Sequence[Gate]]) -> None:
    """Read the gates off a file's rows anew, where their definition has changed since; nothing that was measured does.

    Args:
        path: of the file.
        gates: promises, from all rows.

    Raises:
        ResultsError: the document does not have the agreed shape.
    """
    target = Path(path)
    document = read_results(target)
    document["gates"] = [gate.as_dict() for gate in gates(document["rows"])]
    _write(target, document)


def write_results(
    path: str | os.PathLike[str],
    *,
    rows: Sequence[Row],
    gates: Sequence[Gate],
    command: str | None = None,
    hardware: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Write one results file and return what was written.

    The file is written beside its place and renamed into it: a killed benchmark leaves the old one whole.

    Args:
        path: ``.../<name>.json``.
        rows: what was measured, one object a line of the table.
        gates: the promised numbers among them.
        command: how to run it again; this process's command line if not given.
        hardware: added to (and winning over) what ``describe_hardware`` finds, such as clocks.
        versions: added to what ``describe_versions`` finds.
        commit: the measured commit; the checked-out one if not given.

    Raises:
        ResultsError: the document would not have the agreed shape.
    """
    target = Path(path)
    if target.suffix != ".json":
        raise ResultsError(f"the results file is {target.name!r}; expected a name ending in .json")
    document: dict[str, Any] = {
        "name": target.stem,
        "commit": commit or current_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {**describe_hardware(), **(hardware or {})},
        "versions": {**describe_versions(), **(versions or {})},
        "command": command or describe_command(),
        "rows": [dict(row) for row in rows],
        "gates": [gate.as_dict() for gate in gates],
    }
    _write(target, document)
    return document


def _write(target: Path, document: Mapping[str, Any]) -> None:
    validate(document, stem=target.stem)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and validate one results file.

    Raises:
        ResultsError: it is not JSON, or does not have the agreed shape.
    """
    source = Path(path)
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{source.name} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ResultsError(f"{source.name} holds a {type(document).__name__}; expected an object")
    validate(document, stem=source.stem)
    return document
