"""Canonical JSON (RFC 8785, JCS): one value, one sequence of bytes. What is hashed and signed is in this form.

Keys are sorted by their UTF-16 code units, there is no white space, and numbers are written as ECMAScript writes them,
so that any conforming implementation in any language arrives at the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

__all__ = ["canonical", "parse_canonical", "sha256_hex"]

_SAFE = 2**53 - 1  # beyond this an integer is not the same number in every JSON reader (RFC 7493)


def canonical(value: object) -> bytes:
    """The canonical form of a JSON value.

    Raises:
        ValueError: the value holds something that JSON cannot carry exactly: NaN, infinity, an integer beyond 2^53 - 1,
            a lone surrogate, a key that is no string, or another type.
    """
    return _text(value).encode("utf-8")


def parse_canonical(content: bytes) -> Any:
    """Read a JSON value and insist that ``content`` is its canonical form, so that no byte of it is free to change.

    Raises:
        ValueError: not JSON, or not in canonical form (other spacing, order, escapes, a repeated key).
    """
    try:
        value = json.loads(content.decode("utf-8"), parse_int=_integer)
        again = canonical(value)
    except (UnicodeError, RecursionError, ValueError) as error:
        raise ValueError(f"not canonical JSON: {error}") from error
    if again != content:
        raise ValueError("not canonical JSON: the same value is written in other bytes")
    return value


def sha256_hex(content: bytes) -> str:
    """SHA-256 in lower-case hexadecimal, 64 characters."""
    return hashlib.sha256(content).hexdigest()


def _integer(text: str) -> int | float:
    """A whole number that is too large to be an exact integer everywhere was a float."""
    value = int(text)
    return value if abs(value) <= _SAFE else float(text)


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        value.encode("utf-16-be")  # a lone surrogate raises here
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int):
        if abs(value) > _SAFE:
            raise ValueError(f"{value} lies beyond 2^53 - 1; write it as a string")
        return str(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"keys must be strings, got {sorted(map(repr, value))[:3]}")
        ordered = sorted(value, key=lambda key: key.encode("utf-16-be"))
        return "{" + ",".join(f"{_text(key)}:{_text(value[key])}" for key in ordered) + "}"
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return "[" + ",".join(map(_text, value)) + "]"
    raise ValueError(f"{type(value).__name__} is no JSON value")


def _number(value: float) -> str:
    """ECMAScript's Number::toString: Python finds the same shortest digits but lays them out differently."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is no JSON number")
    if value == 0:
        return "0"
    sign, figures, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)
    digits = "".join(map(str, figures))
    count, point = len(digits), len(digits) + exponent
    if count <= point <= 21:
        text = digits + "0" * (point - count)
    elif 0 < point <= 21:
        text = f"{digits[:point]}.{digits[point:]}"
    elif -6 < point <= 0:
        text = "0." + "0" * -point + digits
    else:
        mantissa = digits[0] + (f".{digits[1:]}" if count > 1 else "")
        text = f"{mantissa}e{'+' if point > 0 else '-'}{abs(point - 1)}"
    return f"-{text}" if sign else text
