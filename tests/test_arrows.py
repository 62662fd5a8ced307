"""Arrows between packages point one way, and each dependency has its home. Read from the source, not from imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each package may import from its siblings.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "host_settings": {"errors"},
    "adapters": {"errors"},
    "aggregation": {"errors"},
    "data": {"errors"},
    "evaluation": {"errors"},
    "runs": {"errors", "adapters", "data", "evaluation"},
    "board": {"errors", "runs"},
    "tracking": {"errors", "runs"},
    "models": {"errors", "adapters", "training.objectives"},
    "security": {"errors", "runs.atomic"},
    "host": {"errors", "models", "security", "training.objectives"},
    "training": {"privacy.dp", "errors", "adapters", "models", "data"},
    # Only its audit, which attacks finished runs; what runs use of it knows nothing of them, see below.
    "privacy": {
        *("errors", "aggregation", "data", "federation", "host", "models", "runs", "training"),
        "unlearning.metrics",
    },
    "federation": {
        "errors",
        "adapters",
        "aggregation",
        "data",
        "evaluation",
        "host",
        "host_settings",
        "models",
        "privacy.dp",
        "privacy.secagg",
        "runs",
        "security",
        "tracking",
        "training",
    },
    "exporting": {"errors", "adapters", "federation", "models", "runs"},
    "unlearning": {
        "errors",
        "adapters",
        "aggregation",
        "data",
        "evaluation",
        "federation",
        "models",
        "runs",
        "security",
        "training",
    },
    "deploy": {
        *("errors", "federation", "host", "host_settings", "runs", "security"),
        *("unlearning.jobs.states", "unlearning.live", "unlearning.protection"),
    },
    "cli": {
        "board",
        "privacy",
        "errors",
        "deploy",
        "unlearning",
        "exporting",
        "adapters",
        "aggregation",
        "data",
        "federation",
        "host",
        "models",
        "runs",
        "evaluation",
        "security",
    },
}
HOMES = {"flwr": {"federation", "cli"}, "grpc": {"host"}, "ray": {"federation"}, "peft": set()}


def modules(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.py") if "_pb2" not in path.name]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def siblings(path: Path) -> set[str]:
    return {name.removeprefix("fednano.") for name in imported(path) if name.startswith("fednano.")}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_packages_import_only_what_lies_below_them(package: str) -> None:
    source = ROOT / "fednano" / package
    files = modules(source) if source.is_dir() else [source.with_suffix(".py")]
    assert files
    for path in files:
        for name in siblings(path):
            top = name.split(".")[0]
            fine = top in (package, "__version__") or any(
                name == allowed or name.startswith(f"{allowed}.") or allowed.startswith(f"{name}.")
                for allowed in ALLOWED[package]
            )
            assert fine, f"{path.relative_to(ROOT)} imports fednano.{name}, which lies above it"


@pytest.mark.parametrize("part", ["dp", "secagg"])
def test_protocols_of_privacy_know_nothing_else(part: str) -> None:
    for path in modules(ROOT / "fednano" / "privacy" / part):
        assert all(name.startswith((f"privacy.{part}", "errors")) for name in siblings(path)), path


def test_every_package_has_its_line() -> None:
    found = {p.stem for p in (ROOT / "fednano").iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert found | {"errors", "host_settings"} == set(ALLOWED)  # modules of their own


@pytest.mark.parametrize("dependency", sorted(HOMES))
def test_dependencies_stay_at_home(dependency: str) -> None:
    for path in modules(ROOT / "fednano"):
        package = path.relative_to(ROOT / "fednano").parts[0]
        if any(name.split(".")[0] == dependency for name in imported(path)):
            assert package in HOMES[dependency], f"{path.relative_to(ROOT)} imports {dependency}"


def test_kernels_import_torch_and_triton_only() -> None:
    for path in modules(ROOT / "kernels"):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & {"fednano", "flwr", "grpc", "transformers", "peft"}, path


@pytest.mark.parametrize("app", ["server_app", "client_app"])
def test_apps_are_entry_points_only(app: str) -> None:
    for path in modules(ROOT / app):
        assert {name.split(".")[0] for name in imported(path)} <= {"fednano"}
        assert len(path.read_text().splitlines()) < 30
