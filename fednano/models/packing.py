"""Tells transformers that a row of a batch is one sample.

Where it is given no attention mask it looks whether positions start anew inside a row, as they do where several
samples are packed into one. On a GPU that question waits for the device; while a CUDA graph is recorded it cannot be
asked, and a full mask is made instead, with which attention is slower.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils

__all__ = ["never_packed"]

_HERE = threading.local()
_NAME = "find_packed_sequence_indices"


@contextmanager
def never_packed() -> Iterator[None]:
    """Within the ``with`` block, on this thread, no row holds more than one sample."""
    _stand()
    before, _HERE.single = getattr(_HERE, "single", False), True
    try:
        yield
    finally:
        _HERE.single = before


def _stand() -> None:
    """Put the answer in front of the question, if this version of transformers asks it."""
    ask = getattr(masking_utils, _NAME, None)
    if ask is not None and not hasattr(ask, "answered"):
        setattr(masking_utils, _NAME, _answered(ask))


def _answered(ask: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ask)
    def answer(*args: Any, **kwargs: Any) -> Any:
        return None if getattr(_HERE, "single", False) else ask(*args, **kwargs)

    answer.answered = True  # type: ignore[attr-defined]
    return answer
