"""The `fednano` command.

Every command imports what it needs when it runs: `fednano --help` must answer at once, and torch takes seconds.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the console command; a user's mistake ends in one message and exit code 2."""
    from fednano.cli.commands import app
    from fednano.cli.failure import reported

    with reported():
        app(prog_name="fednano")
    sys.exit(0)
