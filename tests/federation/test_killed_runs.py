"""kill -9 after each kind of step: the resumed run ends at the bits of the uninterrupted one, client states too."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_runs.py")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_killed_run_resumes_to_the_same_bits(small_vqa: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(small_vqa), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    for rule, ending in result["whole"].items():
        assert len(set(ending.values())) == 3, (
            rule
        )  # the adapter and two clients, each with something of its own
    assert len(result["found"]) == 5
    for case in result["found"]:
        assert case["status"] == -signal.SIGKILL, case
        assert case["resumed"] == 0, (case, done.stderr[-4000:])
        assert case["same"], case
