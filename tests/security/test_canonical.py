"""Canonical JSON against RFC 8785's own examples and against Python's reader."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.security.canonical import canonical, parse_canonical

# RFC 8785, appendix B: IEEE 754 bits and their text.
NUMBERS = {
    "0000000000000000": "0",
    "8000000000000000": "0",
    "0000000000000001": "5e-324",
    "8000000000000001": "-5e-324",
    "7fefffffffffffff": "1.7976931348623157e+308",
    "4340000000000000": "9007199254740992",
    "4430000000000000": "295147905179352830000",
    "44b52d02c7e14af5": "9.999999999999997e+22",
    "44b52d02c7e14af6": "1e+23",
    "444b1ae4d6e2ef4e": "999999999999999700000",
    "444b1ae4d6e2ef50": "1e+21",
    "3eb0c6f7a0b5ed8c": "9.999999999999997e-7",
    "3eb0c6f7a0b5ed8d": "0.000001",
    "41b3de4355555553": "333333333.3333332",
    "becbf647612f3696": "-0.0000033333333333333333",
}

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("bits", sorted(NUMBERS))
def test_numbers_as_in_the_rfc(bits: str) -> None:
    value = struct.unpack(">d", bytes.fromhex(bits))[0]
    assert canonical(value).decode() == NUMBERS[bits]


def test_keys_are_sorted_by_utf16_units_as_in_the_rfc() -> None:
    keys = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    order = ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    assert list(json.loads(canonical(dict.fromkeys(keys, 1)))) == order


@given(JSON)
@settings(deadline=None)
def test_what_is_written_is_read_back_and_has_one_form(value: Any) -> None:
    content = canonical(value)
    again = parse_canonical(content)
    assert canonical(again) == content
    assert again == value  # 1.0 comes back as 1, which is the same number


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None)
def test_no_float_loses_a_bit(value: float) -> None:
    assert float(canonical(value)) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**53, {1: 2}, b"x", "\ud800", {"\udfff": 1}, {1, 2}])
def test_what_json_cannot_carry_exactly_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        canonical(value)


@pytest.mark.parametrize("text", ['{"a": 1}', '{"b":1,"a":2}', '{"a":1,"a":1}', "1.0", '"\\u0041"', "[1]\n"])
def test_other_ways_to_write_the_same_value_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not canonical"):
        parse_canonical(text.encode())
