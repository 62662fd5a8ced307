"""Makes ``tiny_host`` importable; it is a script as well, so it lives beside the tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_host import tiny_part

from fednano.host import RunningHost, serve
from fednano.models.language import LocalLLM


@pytest.fixture(scope="session")
def local() -> LocalLLM:
    return LocalLLM(tiny_part())


@pytest.fixture(scope="module")
def host(local: LocalLLM) -> Iterator[RunningHost]:
    """A host in this process, without TLS or tokens."""
    with serve(local, grace=1.0) as running:
        yield running
