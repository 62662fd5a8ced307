"""What a study of unlearning comes to: each method's settings, distance to retraining, means, gates, a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from fednano.unlearning.metrics import forget_quality, priv_leak

__all__ = ["Row", "choose", "compare", "draw", "gates", "kept", "overall"]

Row = dict[str, Any]


def choose(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """For each method the settings that forget, and among those the ones that keep most."""
    best: dict[tuple[str, str], tuple[tuple[float, ...], Row]] = {}
    for row in rows:
        if row["kind"] == "federated":
            keeps = kept(row)
            reached = row["status"] == "reached"
            # Of settings that keep the same to a percent, the quickest: what only just arrives may not on another seed.
            score: tuple[float, ...] = (
                float(reached),
                round(keeps, 2) if reached else -row["after_probability"],
                -float(row["rounds"]),
            )
            plan = {"rate": row["rate"], "rank": row["rank"]}
        else:
            p = row["after_forget_quality"]["log10_p"]
            forgotten = p >= math.log10(0.05)
            score = (float(forgotten), row["after_utility"] if forgotten else p)
            plan = {"rate": row["rate"]}
        key = (row["part"], row["method"])
        if key not in best or score > best[key][0]:
            best[key] = (score, plan)
    return {key: plan for key, (_, plan) in best.items()}


def kept(row: Row) -> float:
    """Utility after over before: answer probability on TOFU's retained questions, or easy-VQA's test questions."""
    ratio: float = row["utility_ratio"]
    return ratio


def compare(row: Row, reference: Row) -> None:
    """Put an unlearned adapter beside the retrained one, in place."""
    for name in ("exact_memorisation", "extraction_strength", "probability"):
        row[f"reference_{name}"] = reference[f"after_{name}"]
    row["kept"], row["reference_kept"] = kept(row), kept(reference)
    row["em_gap"] = abs(row["after_exact_memorisation"] - reference["after_exact_memorisation"])
    row["es_gap"] = abs(row["after_extraction_strength"] - reference["after_extraction_strength"])
    row["priv_leak"] = (
        priv_leak(row["min_k_auc"], reference["min_k_auc"]) if reference["min_k_auc"] < 1 else None
    )
    if row["after_truth_ratios"] and reference["after_truth_ratios"]:
        quality = forget_quality(row["after_truth_ratios"], reference["after_truth_ratios"])
        row["forget_quality"] = {"p": quality.p, "d": quality.statistic, "n": quality.n}
    row["cost_ratio"] = row["client_seconds"] / reference["client_seconds"]
    # What comes back beyond what the retrained adapter learns of these samples from the same further rounds.
    row["resurfaced"] = max(
        0.0,
        row["later_exact_memorisation"]
        - max(row["after_exact_memorisation"], reference["later_exact_memorisation"]),
    )


def overall(rows: list[Row]) -> list[Row]:
    """Means over the seeds: of each method of a federation; of each split, method and rank of the paper's setting."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] == "federated":
            groups.setdefault((row["part"], row["method"], "", 0), []).append(row)
        elif row["kind"] == "language":
            groups.setdefault((row["part"], row["method"], row["split"], row["rank"]), []).append(row)
    out = []
    for (part, method, split, rank), own in groups.items():
        mean: Row = {"part": part, "kind": "mean", "method": method, "seed": "all", "seeds": len(own)}
        if split:
            mean |= {"split": split, "rank": rank}
        for name, value in own[0].items():
            if name not in mean and isinstance(value, float):
                values = [row[name] for row in own if isinstance(row.get(name), (int, float))]
                mean[name] = fmean(values) if values else None
        if "status" in own[0]:
            mean["reached"] = sum(row["status"] == "reached" for row in own)
            mean["compared"] = sum("em_gap" in row for row in own)
        if part == "language":
            mean["log10_p"] = fmean(row["after_forget_quality"]["log10_p"] for row in own)
        out.append(mean)
    return out


def gates(means: list[Row], seeds: int, rows: list[Row]) -> list[Any]:
    """What the method promised, as gates, of methods that all seeds are measured of.

    Utility is compared where both methods have forgotten by the stop rule: at equal forgetting.
    """
    from results import Gate  # type: ignore[import-not-found]

    made = []
    by = {(row["part"], row["method"]): row for row in means if _whole(row, seeds)}
    for part in sorted({part for part, method in by if method == "loku"}):
        ours = by[part, "loku"]
        made += [
            Gate(f"{part}: loku, exact memorisation, distance to retrained", ours["em_gap"], 0.05, "<="),
            Gate(f"{part}: loku, extraction strength, distance to retrained", ours["es_gap"], 0.05, "<="),
            Gate(f"{part}: loku, utility over before", ours["kept"], 0.97, ">="),
            Gate(f"{part}: loku, client-seconds over retraining's", ours["cost_ratio"], 0.10, "<="),
            Gate(f"{part}: loku, back after five more rounds", ours["resurfaced"], 0.02, "<="),
        ]
        for other in ("gradient_ascent", "gradient_difference"):
            pairs = _both_reached(rows, part, "loku", other) if (part, other) in by else []
            if pairs:
                name = f"{part}: loku's utility over that of {other}, {len(pairs)} of {seeds} seeds"
                made.append(Gate(name, fmean(mine - theirs for mine, theirs in pairs), 0.0, ">="))
    return made


def _both_reached(rows: list[Row], part: str, ours: str, other: str) -> list[tuple[float, float]]:
    """Utility that two methods kept, on each seed on which both have forgotten."""
    kept_by = {
        (row["method"], row["seed"]): row["kept"]
        for row in rows
        if row["kind"] == "federated" and row["part"] == part and row["status"] == "reached"
    }
    seeds = sorted({seed for _, seed in kept_by})
    return [
        (kept_by[ours, seed], kept_by[other, seed])
        for seed in seeds
        if (ours, seed) in kept_by and (other, seed) in kept_by
    ]


def _whole(row: Row, seeds: int) -> bool:
    """Whether a mean of a federation has all its seeds and references."""
    return row["part"] != "language" and row["seeds"] == seeds and row.get("compared") == seeds


def draw(means: list[Row], path: Path) -> None:
    """Forget quality over utility, a pane for each split, a line over the ranks of each method: the paper's figure."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    splits = sorted({row["split"] for row in means})
    figure, panes = plt.subplots(1, len(splits), figsize=(5 * len(splits), 4), squeeze=False)
    for split, pane in zip(splits, panes[0], strict=True):
        for method in dict.fromkeys(row["method"] for row in means):
            own = sorted(
                (row for row in means if (row["split"], row["method"]) == (split, method)),
                key=lambda row: row["rank"],
            )
            kept = [row["after_utility"] / row["before_utility"] for row in own]
            pane.plot(kept, [row["log10_p"] for row in own], marker="o", label=method)
        pane.axhline(math.log10(0.05), color="gray", linewidth=0.8, linestyle=":")
        pane.set(title=f"forget{split}", xlabel="utility, after / before")
    panes[0][0].set_ylabel("log10 of the forget quality's p")
    panes[0][-1].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
