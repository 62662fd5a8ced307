"""Answers what transformers would ask before it makes attention masks, where the answers are known.

Every row of a batch here is one sample, its tokens at the left, and no mask is given: plain causal attention is right,
and the fast kernels have it built in. transformers asks two things before it agrees. Do positions start anew inside a
row, as where several samples are packed into one? On a GPU that waits for the device. Is this pass being recorded? If
it is, a full mask is made, with which attention is slower, and which compiled blocks have not seen before.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils

__all__ = ["plain_rows"]

_HERE = threading.local()
_ANSWERS = {"find_packed_sequence_indices": None, "is_tracing": False}


@contextmanager
def plain_rows() -> Iterator[None]:
    """Within the ``with`` block, on this thread, no row holds more than one sample, and nothing is traced."""
    for name, answer in _ANSWERS.items():
        ask = getattr(masking_utils, name, None)  # this version of transformers may not have it
        if ask is not None and not hasattr(ask, "answered"):
            setattr(masking_utils, name, _answered(ask, answer))
    before, _HERE.plain = getattr(_HERE, "plain", False), True
    try:
        yield
    finally:
        _HERE.plain = before


def _answered(ask: Callable[..., Any], known: Any) -> Callable[..., Any]:
    @functools.wraps(ask)
    def answer(*args: Any, **kwargs: Any) -> Any:
        return known if getattr(_HERE, "plain", False) else ask(*args, **kwargs)

    answer.answered = True  # type: ignore[attr-defined]
    return answer
