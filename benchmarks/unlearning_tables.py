"""Tables of ``benchmarks/results/unlearning.json``; `benchmarks/tables.py` puts them into the docs."""

from __future__ import annotations

from statistics import fmean
from typing import Any

__all__ = ["federation", "language"]

_EVERY_RANK = 16


def federation(document: dict[str, Any]) -> str:
    """The methods in a federation beside retraining, a table for each data set: means over the seeds."""
    rows = document["rows"]
    parts = sorted({row["part"] for row in rows if row["kind"] == "reference"})
    return "\n\n".join(_federation(rows, part) for part in parts)


def _federation(rows: list[dict[str, Any]], part: str) -> str:
    references = [row for row in rows if row["kind"] == "reference" and row["part"] == part]
    means = [row for row in rows if row["kind"] == "mean" and row["part"] == part]
    seeds = len(references)
    lines = [
        f"**{part}**, means of {seeds} seeds",
        "",
        "| Method | Has forgotten | Exact memorisation | Extraction strength | Utility, of before | Client-seconds, of "
        "retraining | Five rounds later, guarded | Unguarded |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]

    def mean_of(name: str) -> float:
        return fmean(row[name] for row in references)

    before = fmean(row["before_exact_memorisation"] for row in means)
    lines.append(f"| before | | {before:.3f} | {mean_of('before_extraction_strength'):.3f} | 1.00 | | | |")
    lines.append(
        f"| retrained | | {mean_of('after_exact_memorisation'):.3f} | {mean_of('after_extraction_strength'):.3f} | "
        f"{mean_of('utility_ratio'):.2f} | 1.000 | | {mean_of('later_exact_memorisation'):.3f} |"
    )
    for row in sorted(means, key=lambda row: (-row["reached"], -row["kept"])):
        lines.append(
            f"| {row['method']} | {row['reached']} of {seeds} | {row['after_exact_memorisation']:.3f} | "
            f"{row['after_extraction_strength']:.3f} | {row['kept']:.2f} | {row['cost_ratio']:.3f} | "
            f"{row['later_exact_memorisation']:.3f} | {row['unguarded_exact_memorisation']:.3f} |"
        )
    return "\n".join(lines)


def language(document: dict[str, Any]) -> str:
    """The paper's setting in small: forget quality and utility of each method, means over the seeds."""
    means = [row for row in document["rows"] if row["kind"] == "mean" and row["part"] == "language"]
    splits = sorted({row["split"] for row in means})
    found = {(row["method"], row["split"]): row for row in means if row["rank"] == _EVERY_RANK}
    lines = [
        "| log₁₀ p of forget quality, and utility of before | "
        + " | ".join(f"forget{split}" for split in splits)
        + " |",
        "|---|" + "---:|" * len(splits),
    ]
    for method in dict.fromkeys(row["method"] for row in means):
        cells = []
        for split in splits:
            row = found[method, split]
            cells.append(f"{row['log10_p']:.1f}, {row['after_utility'] / row['before_utility']:.2f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
