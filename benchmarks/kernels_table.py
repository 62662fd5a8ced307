"""Write the tables of ``docs/kernels.md`` from the results of ``fednano bench kernels``; ``--check`` only compares.

``kernels.json`` holds the kernels, ``client_step.json`` a client's step as a whole (``--only client_step``).

python -m benchmarks.kernels_table [--check]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from benchmarks.results import read_results

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
_BLOCK = re.compile(r"(<!-- kernels: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
OURS = ("fused", "ours")


def gates(document: dict[str, Any]) -> str:
    """Every promise, what was measured, and whether it holds."""
    lines = ["| gate | measured | bound | |", "|---|---:|---:|---|"]
    for gate in document["gates"]:
        state = "met" if gate["met"] else "**missed**"
        bound = f"{gate['sense'].replace('<=', '≤').replace('>=', '≥')} {gate['bound']:g}"
        lines.append(f"| `{gate['name']}` | {gate['value']:.2f} | {bound} | {state} |")
    return "\n".join(lines) + "\n"


def rows(document: dict[str, Any]) -> str:
    """Every timing: milliseconds of the base, and each variant as a multiple of it."""
    lines = [
        "| kernel | case | pass | mode | base | base, µs | multiples of the base |",
        "|---|---|---|---|---|---:|---|",
    ]
    for row in document["rows"]:
        ratios = ", ".join(
            f"**{name} {value:.2f}**" if name in OURS else f"{name} {value:.2f}"
            for name, value in row["ratio"].items()
            if name != row["base"]
        )
        cells = [
            row["kernel"],
            row["case"],
            row["pass"],
            row["mode"],
            row["base"],
            f"{1e3 * row['base_ms']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} | {ratios} |")
    return "\n".join(lines) + "\n"


def client(document: dict[str, Any]) -> str:
    """A client's step and Fisher: milliseconds and peak memory of every way."""
    lines = ["| what | case | way | ms | times as fast | extra memory, MB |", "|---|---|---|---:|---:|---:|"]
    for row in document["rows"]:
        for name, milliseconds in row["ms"].items():
            bold = "**" if name in OURS else ""
            cells = [
                *(row["kernel"], row["case"], f"{bold}{name}{bold}", f"{milliseconds:.2f}"),
                *(f"{row['base_ms'] / milliseconds:.2f}", f"{row['peak_bytes'][name] / 1e6:.0f}"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    gpu = document["hardware"]["gpus"][0]["name"]
    return "\n".join(lines) + f"\n\nOne {gpu}, commit `{document['commit']}`, plain calls from Python.\n"


def card(document: dict[str, Any]) -> str:
    """What was measured on."""
    hardware, versions = document["hardware"], document["versions"]
    return (
        f"{hardware['gpus'][0]['name']}, driver {hardware['driver_version']}, SM clock under load "
        f"{hardware['clocks.sm']} of {hardware['clocks.max.sm']}, copy {hardware['copy_bytes_per_s'] / 1e12:.2f} TB/s "
        f"(read and write), 8192³ bf16 product {hardware['bf16_product_flop_per_s'] / 1e12:.0f} TFLOP/s; torch "
        f"{versions['torch']}, triton {versions['triton']}, peft {versions['peft']}, liger-kernel "
        f"{versions['liger-kernel']}; commit `{document['commit']}`; {hardware['seconds']} s for everything.\n"
    )


def render(page: str, results: Path) -> str:
    """The page with every block replaced."""
    kernels = read_results(results / "kernels.json")
    made = {"gates": gates(kernels), "rows": rows(kernels), "card": card(kernels)}
    made["client"] = client(read_results(results / "client_step.json"))
    return _BLOCK.sub(lambda m: m.group(1) + made[m.group("name")] + m.group(3), page)


def main(argv: list[str] | None = None) -> int:
    """0 if the page is current or was written, 1 if ``--check`` found it old."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    old = PAGE.read_text(encoding="utf-8")
    new = render(old, ROOT / "benchmarks" / "results")
    if options.check:
        print(
            "docs/kernels.md is current"
            if new == old
            else "docs/kernels.md is old: python -m benchmarks.kernels_table"
        )
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
