"""Numbers as people read them."""

from __future__ import annotations

import math

__all__ = ["ZERO_SHOT", "format_bytes", "format_count", "format_percent", "format_seconds", "phase_title"]

ZERO_SHOT = "zero-shot"
"""The phase of the model before tuning, as metrics and live views name it."""

_TITLES = {
    "zero_shot": "Zero-shot",
    "federated": "Federated",
    "local_only": "Local only",
    "local": "Local only",
    "centralised": "Centralised",
    "centralized": "Centralised",
    "fedavg": "FedAvg",
    "fisher": "Fisher merging",
}


def format_bytes(count: float) -> str:
    """Decimal units, three significant digits: ``41_234`` is ``"41.2 kB"``."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while abs(size) >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" and size == int(size) else f"{_three(size)} {units[0]}"


def format_count(count: float) -> str:
    """``2_350_000`` is ``"2.35 M"``; below ten thousand the number itself."""
    if abs(count) < 10_000:
        return f"{count:,.0f}"
    size, units = float(count), ["", "k", "M", "G", "T"]
    while abs(size) >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{_three(size)} {units[0]}"


def format_percent(share: float) -> str:
    """``0.9312`` is ``"93.1 %"``."""
    return f"{100 * share:.1f} %"


def format_seconds(seconds: float) -> str:
    """``75.2`` is ``"1:15"``, ``3675`` is ``"1:01:15"``."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def phase_title(phase: str) -> str:
    """A phase's name for people; an unknown one is shown as it is, with spaces."""
    name = phase.replace("-", "_")
    return _TITLES.get(name, name.replace("_", " "))


def _three(size: float) -> str:
    digits = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{digits}f}"
