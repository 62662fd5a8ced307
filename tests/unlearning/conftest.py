"""Keys, a registry and a run folder without a model: all that the job machinery itself needs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fednano.security.keys import Signer, create_key
from fednano.unlearning.jobs.registry import Registry
from fednano.unlearning.jobs.request import Plan, sign_request

RUN = "20260101-000000-test"


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return create_key(tmp_path / "keys", "client-000")


@pytest.fixture
def registry(tmp_path: Path, signer: Signer) -> Registry:
    empty = Registry.load(tmp_path / "registry.json")
    return empty.with_site(signer.name, signer.public, signer.salt, known=["client-000", "client-001"])


@pytest.fixture
def envelope(signer: Signer) -> Callable[..., dict[str, Any]]:
    def make(**changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "run": RUN,
            "kind": "samples",
            "name": "",
            "ids": ["a/train/1", "a/train/2"],
            "plan": Plan(),
            "reason": "test",
        }
        by = changes.pop("signer", signer)
        return sign_request(by, **{**values, **changes})

    return make
