"""Fenced blocks of the pages, and how their commands are run."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SHELLS = ("bash", "sh", "shell", "console", "zsh")
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+?) -->\n)?^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block. ``why`` is the reason for which it is not run, or empty."""

    page: Path
    line: int
    language: str
    text: str
    why: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Its command lines, without comments."""
        joined = self.text.replace("\\\n", " ")
        lines = (line.strip() for line in joined.splitlines())
        return [line for line in lines if line and not line.startswith("#")]

    @property
    def file(self) -> str:
        """The file that the block is, where its first line names one."""
        named = re.match(r"# ([\w.-]+\.(?:toml|py|jsonl|csv))\n", self.text)
        return named[1] if named else ""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: m.start()].count("\n") + 1, m["language"], m["text"], m["why"] or "")
        for m in _BLOCK.finditer(text)
    ]


def words(line: str) -> list[str]:
    """A command line as words, without its comment, and without an option in brackets."""
    line = re.sub(r"\$\([^)]*\)", "SUBSTITUTED", line)
    return [word for word in shlex.split(line, comments=True) if word != "[--json]"]


def expanded(line: str, folder: Path) -> list[str]:
    """The same as a shell in ``folder`` sees it, with ``$(...)`` replaced."""
    script = f'show() {{ printf "%s\\0" "$@"; }}; show {line}'
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]
