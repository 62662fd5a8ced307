"""Further parts of the report: clients over the rounds, the adapters' spectrum, who saw what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fednano.runs.charts import bar
from fednano.runs.report_metrics import Metrics
from fednano.runs.summary import Summary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["client_heat", "privacy_rows", "spectra", "spectrum_rows"]

_COLUMNS = 24


def client_heat(metrics: Metrics) -> dict[str, Any] | None:
    """Training loss of every client in every round, as a table with shades; None where there is none.

    Rounds are put together where there are more than fit on a page; a cell then holds their mean.
    """
    found = metrics.client_rounds
    rounds = sorted({number for own in found.values() for number in own})
    if not rounds:
        return None
    width = math.ceil(len(rounds) / _COLUMNS)
    parts = [rounds[start : start + width] for start in range(0, len(rounds), width)]
    losses = [value for own in found.values() for value in own.values() if value is not None]
    low, high = (min(losses), max(losses)) if losses else (0.0, 0.0)
    rows = []
    for client, own in found.items():
        cells = []
        for part in parts:
            known = [own[number] for number in part if number in own]
            merged = [value for value in known if value is not None]
            mean = math.fsum(merged) / len(merged) if merged else None
            shade = 0 if mean is None or high <= low else round(100 * (mean - low) / (high - low))
            text = "" if not known else "✗" if mean is None else f"{mean:.2g}"
            state = "took no part" if not known else "refused" if mean is None else f"loss {mean:.4g}"
            cells.append({"text": text, "shade": shade, "hover": f"{client}, {_span(part)}: {state}"})
        rows.append({"client": client, "cells": cells})
    return {
        "columns": [_span(part).removeprefix("round ").removeprefix("rounds ") for part in parts],
        "rows": rows,
    }


def _span(part: Sequence[int]) -> str:
    return f"round {part[0]}" if len(part) == 1 else f"rounds {part[0]}–{part[-1]}"


def spectra(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Singular values of each stream's change, where its leaves are two factors of one, in double precision.

    The product of a (d, r) and a (r, d) leaf is never built: its singular values are those of the r x r product of the
    two factors' triangles (QR).

    Args:
        tensors: leaves by ``"<stream>.<leaf>"``.
    """
    import torch

    by_stream: dict[str, list[Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        stream, dot, _ = name.partition(".")
        if dot and tensor.ndim == 2 and tensor.is_floating_point() and not name.startswith("beside/"):
            by_stream.setdefault(stream, []).append(tensor.double())
    found = {}
    for stream, leaves in by_stream.items():
        if len(leaves) != 2:
            continue
        tall = [leaf for leaf in leaves if leaf.shape[0] >= leaf.shape[1]]
        wide = [leaf for leaf in leaves if leaf.shape[0] < leaf.shape[1]]
        if len(tall) != 1 or len(wide) != 1 or tall[0].shape[1] != wide[0].shape[0]:
            continue
        left = torch.linalg.qr(tall[0], mode="r").R
        right = torch.linalg.qr(wide[0].T, mode="r").R
        values = torch.linalg.svdvals(left @ right.T)
        if bool(torch.isfinite(values).all()):
            found[stream] = [float(value) for value in values]
    return found


def spectrum_rows(found: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """One block for each stream: its singular values as bars, and how many of its ranks are in use.

    The effective rank is ``exp`` of the entropy of the values' shares (Roy and Vetterli 2007).
    """
    blocks = []
    for stream, values in found.items():
        total = math.fsum(values)
        shares = [value / total for value in values] if total > 0 else []
        effective = (
            math.exp(-math.fsum(share * math.log(share) for share in shares if share > 0)) if shares else 0.0
        )
        largest = max(values, default=0.0)
        blocks.append(
            {
                "stream": stream,
                "rank": len(values),
                "effective": f"{effective:.1f}",
                "bars": [
                    {
                        "name": f"{place}",
                        "value": f"{value:.3g}",
                        "bar": bar(
                            value / largest if largest else 0.0,
                            hover=f"{stream} {place}: {value:.4g}",
                            number=2,
                        ),
                    }
                    for place, value in enumerate(values[:16], start=1)
                ],
                "more": max(0, len(values) - 16),
            }
        )
    return blocks


def privacy_rows(config: Mapping[str, Any], summary: Summary | None) -> list[tuple[str, str]]:
    """Who saw what in this run, and what protected it."""
    split = config.get("placement", "split") == "split"
    kept = config.get("exchange") == "label-private"
    encoded = str(config.get("wire-dtype", "float32"))
    secure = bool(config.get("secure-aggregation"))
    rows = [("Images and texts", "stayed with the clients")]
    if split:
        rows.append(("Embeddings", f"adapted ones of every step reached the language host, as {encoded}"))
        stayed = "stayed with the clients, with the model's head"
        rows.append(("Answers", stayed if kept else "reached the language host as labels of every step"))
    else:
        rows.append(("Embeddings, answers", "stayed with the clients, which held the whole model"))
    rows.append(
        (
            "Updates",
            "the server saw sums over clients only (secure aggregation)"
            if secure
            else "each client's reached the server",
        )
    )
    private = (summary.extra.get("privacy") if summary else None) or {}
    if private and isinstance(private, Mapping):
        rows.append(("Differential privacy", f"by {private.get('unit', 'client')}"))
        shown = {key: value for key, value in private.items() if key != "unit"}
        rows += [
            ({"epsilon": "ε", "delta": "δ"}.get(key, str(key).replace("_", " ")), _plain(value))
            for key, value in shown.items()
        ]
    elif config.get("dp", "off") not in ("off", ""):
        rows.append(("Differential privacy", f"by {config['dp']}; the run did not get to count ε"))
    else:
        rows.append(("Differential privacy", "none: ε is not bounded"))
    return rows


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
