"""Record a first session as ``first-session.md``: commands, what they print, how long they take.

    python docs/record.py [PAGE]

``tests/docs/test_recording.py`` runs the commands of the page again and compares what they say.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parent / "first-session.md"
COMMANDS = (
    "fednano doctor",
    "fednano simulate --rounds 2 --clients 3 --samples 32 --final-samples 100",
    'fednano generate latest "what color is the shape?" --image runs/latest/images/$(ls runs/latest/images | head -1)',
    "fednano simulate --rule fisher --rounds 2 --clients 3 --samples 32 --final-samples 100 --backend inprocess",
    "fednano compare runs/2*",
    "fednano export latest --format peft",
    "fednano simulate --rule fischer",
    "fednano init ward-study",
)
"""What is recorded, in this order, in one folder that is empty at first."""
_INTRODUCTION = """\
# The first session, recorded

What a new user sees, word for word; only folder names are shortened. Made by `docs/record.py` on {machine}
in {total:.0f} seconds; a test runs it again and compares what the commands say.
"""
_STEP = re.compile(
    r"^```text\n\$ (?P<command>[^\n]+)\n(?P<output>.*?)^```\n\n*\*(?P<note>[^*]+)\*$", re.M | re.S
)


@dataclass(frozen=True)
class Step:
    """One command of the session.

    Attributes:
        command: as typed.
        output: what it printed, standard error included.
        code: exit code.
        seconds: from start to end.
    """

    command: str
    output: str
    code: int
    seconds: float


def carry_out(command: str, folder: Path) -> Step:
    """Run a command line in a folder, with this environment's programs."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for odd in ("COLUMNS", "FORCE_COLOR", "PYTEST_CURRENT_TEST"):
        environment.pop(odd, None)
    environment |= {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=900,
    )
    seconds = time.monotonic() - began
    output = done.stdout.replace(str(folder), ".").replace(str(Path(sys.prefix)), "VENV")
    return Step(command, "\n".join(line.rstrip() for line in output.splitlines()), done.returncode, seconds)


def page(steps: list[Step]) -> str:
    """The page in Markdown."""
    machine = f"a laptop-sized machine ({os.cpu_count()} cores, {platform.machine()}, no GPU)"
    parts = [_INTRODUCTION.format(machine=machine, total=sum(step.seconds for step in steps))]
    for step in steps:
        parts.append(
            f"```text\n$ {step.command}\n{step.output}\n```\n\n*{step.seconds:.0f} s, exit code {step.code}*\n"
        )
    return "\n".join(parts)


def steps_of(text: str) -> list[Step]:
    """The steps that a page holds."""
    found = []
    for match in _STEP.finditer(text):
        seconds, code = re.findall(r"\d+", match["note"])
        found.append(Step(match["command"], match["output"].rstrip("\n"), int(code), float(seconds)))
    return found


def said(output: str) -> list[str]:
    """What an output says, without what another machine or hour may change: its numbers, and the lines' order."""
    lines = []
    for line in output.splitlines():
        if " machine, " in line:  # what `fednano doctor` says of this one
            continue
        masked = re.sub(r"\d[\d.,:-]*", "#", line)
        masked = re.sub(r"# (s|ms|min|h|[kMG]B|[kMG]iB|B)\b", "#", masked)
        masked = re.sub(r"[+-]#", "#", masked)
        if words := masked.split():
            lines.append(" ".join(words))
    return sorted(lines)


def main() -> None:
    """Record, and write the page."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    with tempfile.TemporaryDirectory() as place:
        steps = []
        for command in COMMANDS:
            steps.append(carry_out(command, Path(place)))
            print(f"{steps[-1].seconds:5.1f} s  {steps[-1].code}  {command}", flush=True)
    target.write_text(page(steps))


if __name__ == "__main__":
    main()
