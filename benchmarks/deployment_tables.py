"""Tables of what deployments cost and withstand, from their committed results."""

from __future__ import annotations

from typing import Any

__all__ = ["scale", "secagg", "soak"]


def scale(document: dict[str, Any]) -> str:
    """Memory and time over the clients of a round."""
    lines = ["| Clients a round | Peak resident memory, MiB | ms a client and round |", "|---:|---:|---:|"]
    for row in document["rows"]:
        time_ms = 1000 * row["seconds_per_client"]
        lines.append(f"| {row['clients']} | {row['peak_bytes'] / 2**20:.0f} | {time_ms:.1f} |")
    return "\n".join(lines)


def secagg(document: dict[str, Any]) -> str:
    """Secure aggregation over the number of clients: one client's time against Flower's, and its bytes."""
    lines = [
        "| Clients | Neighbours | Lost | Wrong words | A client, ms | flwr's SecAgg+, ms | Ratio | Up, over fp32 |",
        "|" + "---:|" * 8,
    ]
    for row in document["rows"]:
        cells = [
            *(str(row[name]) for name in ("clients", "neighbours", "lost", "wrong_words")),
            *(f"{1000 * row[name]:.0f}" for name in ("seconds_client", "flower_seconds_client")),
            f"{row['times_faster_than_flower']:.1f} ×",
            f"{row['bytes_up_over_fp32']:.2f} ×",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def soak(document: dict[str, Any]) -> str:
    """What a soak did."""
    row = next(row for row in document["rows"] if row["kind"] == "summary")
    kills = ", ".join(f"{name} {count}" for name, count in sorted(row["by_kind"].items()))
    pairs = [
        ("minutes", f"{row['seconds'] / 60:.0f}"),
        ("sites", str(row["clients"])),
        ("runs, rounds", f"{row['runs']}, {row['rounds']}"),
        ("`kill -9`", f"{row['kills']} ({kills})"),
        (
            "resident memory, median",
            f"server {row['server_mib_median']:.0f} MiB, host {row['host_mib_median']:.0f} MiB",
        ),
        (
            "accuracy before and after",
            f"{100 * row['accuracy_zero_shot']:.1f} %, {100 * row['accuracy_tuned']:.1f} %",
        ),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in pairs)])
