"""What was promised of the language host, read off the rows of its benchmark."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from host_model import Shape
from results import Gate


def gates(rows: Sequence[Mapping[str, Any]], shape: Shape) -> list[Gate]:
    """Every promise whose rows are there. Speed is that of a host with default settings unless the name says more."""
    short, _, long = shape.lengths
    found: list[Gate] = []

    def pick(section: str, **wanted: Any) -> list[Mapping[str, Any]]:
        return [
            row
            for row in rows
            if row["section"] == section and all(row.get(key) == value for key, value in wanted.items())
        ]

    for length, bound in ((long, 1.5), (short, 5.0)):
        alone = pick("clients", name="one at a time", engine="plain", clients=8, tokens=length)
        joined = pick("clients", name="together", engine="plain", clients=8, tokens=length)
        if alone and joined:
            ratio = joined[0]["steps_per_second"] / max(alone[0]["steps_per_second"], 1e-9)
            found.append(
                Gate(f"8 clients of 1 at {length} tokens: together over one at a time", ratio, bound, ">=")
            )
    paths = pick("path", tokens=long)
    if paths:
        # The best way to set the host up; of its turns the median, of two the mean.
        best = max(
            statistics.median(row["ratio"] for row in paths if row["engine"] == engine)
            for engine in {row["engine"] for row in paths}
        )
        found.append(
            Gate(f"8 clients over TLS at {long} tokens over the same batch in process", best, 0.90, ">=")
        )
    long_passes = [
        row for row in pick("pass", samples=16, tokens=long) if row["name"] in ("plain", "compiled")
    ]
    if long_passes:
        best = max(row["useful_tflops"] for row in long_passes)
        found.append(Gate(f"useful TFLOP/s at 16 x {long}", best, 480.0, ">="))
    within = [row for row in pick("pass", samples=8, tokens=long) if "within" in row["name"]]
    if within:
        found.append(Gate(f"peak GB at 8 x {long}", min(row["peak_gb"] for row in within), 26.0, "<="))
    sizes = {row["name"]: row["bytes_per_sample_step"] for row in pick("bytes")}
    for name in ("factored", "factored, lossless", "factored, image stream alone", "factored, int8"):
        if "full" in sizes and name in sizes:
            found.append(
                Gate(
                    f"bytes, full over {name}, rank {shape.rank}, batch 8",
                    sizes["full"] / sizes[name],
                    30.0,
                    ">=",
                )
            )
    edge = [row for row in pick("client") if row["name"].startswith("NanoEdge")]
    whole = [row for row in pick("client") if row["name"].startswith("whole")]
    if edge and whole:
        for where, key in (("memory", "weights_gb"), ("disk", "disk_gb")):
            share = edge[0].get(key, edge[0]["weights_gb"]) / whole[0]["weights_gb"]
            found.append(
                Gate(f"weights at a client over the whole LLM with LoRA, {where}", share, 0.05, "<=")
            )
    for row in pick("fault"):
        found.append(Gate(f"{row['name']}: wrong gradients", row["wrong"], 0, "<="))
        found.append(Gate(f"{row['name']}: failures", row["errors"], 0, "<="))
        if "memory_over_base" in row:
            found.append(
                Gate(f"{row['name']}: memory afterwards over before", row["memory_over_base"], 1.01, "<=")
            )
    return found
