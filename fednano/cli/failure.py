"""From an exception to what a user sees: one message, what to do, and an exit code.

Exit codes: 0 done; 1 a defect of fednano (with stack trace); 2 a mistake that the message explains; 3 the language host
is out of reach or refuses; 4 an unlearning request is refused; 5 an unlearning job is in another state than this needs;
6 a receipt or its log is not what was signed; 7 `fednano doctor` found what will not work; 130 ended by Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fednano.errors import (
    FednanoError,
    HostError,
    Interrupted,
    JobStateError,
    ReceiptInvalid,
    RequestRefused,
)

__all__ = [
    "EXIT_HOST",
    "EXIT_INTERRUPTED",
    "EXIT_INVALID",
    "EXIT_MISTAKE",
    "EXIT_REFUSED",
    "EXIT_STATE",
    "EXIT_UNFIT",
    "reported",
]

EXIT_MISTAKE = 2
EXIT_HOST = 3
EXIT_REFUSED = 4
EXIT_STATE = 5
EXIT_INVALID = 6
EXIT_UNFIT = 7
EXIT_INTERRUPTED = 130

_CODES: dict[type[FednanoError], int] = {
    HostError: EXIT_HOST,
    RequestRefused: EXIT_REFUSED,
    JobStateError: EXIT_STATE,
    ReceiptInvalid: EXIT_INVALID,
}


@contextmanager
def reported() -> Iterator[None]:
    """Turn the errors a user can understand into one message on standard error and an exit code."""
    try:
        yield
    except FednanoError as error:
        _say(error)
        sys.exit(next((code for kind, code in _CODES.items() if isinstance(error, kind)), EXIT_MISTAKE))
    except KeyboardInterrupt:
        print("ended by Ctrl-C.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Interrupted as error:
        _say(error)
        sys.exit(EXIT_INTERRUPTED)


def _say(error: FednanoError | Interrupted) -> None:
    if not error.shown:
        print(f"error: {error}", file=sys.stderr)
