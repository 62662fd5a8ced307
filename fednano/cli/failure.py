"""From an exception to what a user sees: one message, what to do, and an exit code.

Exit codes: 0 done; 1 a defect of fednano (with stack trace); 2 a mistake that the message explains; 3 the language host
is out of reach or refuses; 130 ended by Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fednano.errors import FednanoError, HostError, Interrupted

__all__ = ["EXIT_HOST", "EXIT_INTERRUPTED", "EXIT_MISTAKE", "reported"]

EXIT_MISTAKE = 2
EXIT_HOST = 3
EXIT_INTERRUPTED = 130


@contextmanager
def reported() -> Iterator[None]:
    """Turn the errors a user can understand into one message on standard error and an exit code."""
    try:
        yield
    except FednanoError as error:
        _say(error)
        sys.exit(EXIT_HOST if isinstance(error, HostError) else EXIT_MISTAKE)
    except KeyboardInterrupt:
        print("ended by Ctrl-C.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Interrupted as error:
        _say(error)
        sys.exit(EXIT_INTERRUPTED)


def _say(error: FednanoError | Interrupted) -> None:
    if not error.shown:
        print(f"error: {error}", file=sys.stderr)
