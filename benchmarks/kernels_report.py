"""What the cases of the kernel benchmark produce, and the table printed from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.results import Gate


@dataclass
class Report:
    """Rows, gates and notes, in the order in which they were measured.

    Attributes:
        bandwidth: bytes a second of a large copy on this card; floors are bytes over this.
        rows: one object a (kernel, case, pass, mode).
        gates: one a promise.
    """

    bandwidth: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    def floor_ms(self, moved_bytes: float) -> float:
        """Milliseconds that moving so many bytes takes at the measured bandwidth."""
        return moved_bytes / self.bandwidth * 1e3

    def row(
        self, kernel: str, case: str, what: str, mode: str, milliseconds: dict[str, float], *, base: str,
        base_ms: float | None = None, **more: Any,
    ) -> dict[str, float]:  # fmt: skip
        """Add one row and print it; returns every variant's ratio to the base.

        Args:
            kernel: "K1 nano_adapter".
            case: shapes.
            what: "forward", "forward+backward", ...
            mode: "eager" or "graph".
            milliseconds: variant -> median.
            base: what the ratios are to: a variant's name, or a floor's.
            base_ms: milliseconds of the floor, if the base is none of the variants.
            **more: other columns.
        """
        unit = milliseconds.get(base) if base_ms is None else base_ms
        ratios = {name: value / unit for name, value in milliseconds.items()} if unit else {}
        columns = {"kernel": kernel, "case": case, "pass": what, "mode": mode, "base": base, "base_ms": unit}
        self.rows.append({**columns, "ms": milliseconds, "ratio": ratios, **more})
        numbers = "  ".join(f"{name} {ratios.get(name, 0):.2f}" for name in milliseconds)
        absolute = " ".join(f"{value * 1e3:.0f}" for value in milliseconds.values())
        print(
            f"{kernel:22} {case:32} {what:17} {mode:6} ×{base} ({(unit or 0) * 1e3:.0f} us): {numbers}  [{absolute}]"
        )
        return ratios

    def gate(self, name: str, value: float, bound: float, sense: Any) -> None:
        """Add one gate."""
        self.gates.append(Gate(name, float(value), bound, sense))

    def table(self) -> str:
        """The ratios and the gates, as text."""
        lines = ["", "gate                                             value    bound"]
        for gate in self.gates:
            mark = "met" if gate.met else "MISSED"
            lines.append(f"{gate.name:46} {gate.value:8.3f} {gate.sense} {gate.bound:<8g} {mark}")
        return "\n".join(lines)
