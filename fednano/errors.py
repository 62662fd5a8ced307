"""Exceptions that a user may see. Each message says what was got, what was expected, and what to do.

::

    FednanoError
    ├── ConfigError      a setting is wrong: name, type, range or combination
    ├── ModelError       a model cannot be loaded, split, or does not fit its adapter
    ├── DataError        data is missing, cannot be decoded, or cannot be partitioned as asked
    ├── HostError        the language host refused a call or cannot be reached
    │   ├── HostUnavailable    nobody answers, even after retries
    │   └── HostRefused        the host answered that the call is not acceptable
    ├── UpdateRefused    a client's update failed validation and must not be merged
    ├── TrainingDiverged a loss or a gradient stopped being finite
    ├── RunError         a run cannot start, resume or be read
    ├── RequestRefused   an unlearning request or approval is not acceptable: signature, replay, scope, quota
    ├── JobStateError    an unlearning job is not in a state in which this can be done
    └── ReceiptInvalid   a receipt or the log of receipts is not what was signed

:class:`Interrupted` stands apart: nothing was wrong, somebody asked the run to end.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DataError",
    "FednanoError",
    "HostError",
    "HostRefused",
    "HostUnavailable",
    "Interrupted",
    "JobStateError",
    "ModelError",
    "ReceiptInvalid",
    "RequestRefused",
    "RunError",
    "TrainingDiverged",
    "UpdateRefused",
    "did_you_mean",
]


class FednanoError(Exception):
    """Base of all errors that end in one message for the user instead of a stack trace.

    Attributes:
        shown: a run's own display has said it already; the command line need not repeat it.
    """

    shown: bool = False


class ConfigError(FednanoError):
    """A setting is wrong: name, type, range or combination."""


class ModelError(FednanoError):
    """A model cannot be loaded or split, or does not fit its adapter."""


class DataError(FednanoError):
    """Data is missing, cannot be decoded, or cannot be partitioned as asked."""


class HostError(FednanoError):
    """The language host refused a call or cannot be reached."""


class HostUnavailable(HostError):
    """Nobody answers at the host's address, even after retries."""


class HostRefused(HostError):
    """The host answered that the call is not acceptable (shape, dtype, limits, token)."""


class UpdateRefused(FednanoError):
    """A client's update failed validation and must not be merged."""


class TrainingDiverged(FednanoError):
    """A loss or a gradient stopped being finite."""


class RunError(FednanoError):
    """A run cannot start, resume or be read."""


class RequestRefused(FednanoError):
    """An unlearning request or approval is not acceptable: signature, replay, scope, quota."""


class JobStateError(FednanoError):
    """An unlearning job is not in a state in which this can be done."""


class ReceiptInvalid(FednanoError):
    """A receipt or the log of receipts is not what was signed."""


class Interrupted(Exception):
    """The run was asked to end, by Ctrl-C or from elsewhere; what was done is kept. ``shown`` as above."""

    shown: bool = False


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence, with a space before it, that names the nearest known word; empty where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
