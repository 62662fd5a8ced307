"""The tables and the picture of ``docs/host.md``, from the rows of ``benchmarks/results/host.json``.

python -m benchmarks.host_tables      # draws benchmarks/results/host.svg anew; the tables are benchmarks/tables.py's
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from results import read_results

RESULTS = Path(__file__).parent / "results" / "host.json"


def _rows(document: dict[str, Any], section: str) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if row["section"] == section]


def _table(head: list[str], lines: list[list[str]], words: int = 1) -> str:
    rule = "|" + "---|" * words + "---:|" * (len(head) - words)
    return "\n".join(
        ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]
    )


def card(document: dict[str, Any]) -> str:
    """What was measured on."""
    hardware, versions = document["hardware"], document["versions"]
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "triton", "transformers", "grpcio", "peft")
    )
    return (
        f"{hardware['gpus'][0]['name']}, {hardware['cores']} cores ({hardware['cpu']}); {packages}; "
        f"commit `{document['commit'][:7]}`; `{document['command']}`."
    )


def passes(document: dict[str, Any]) -> str:
    """Passes in one process."""
    lines = [
        [
            row["name"],
            f"{row['samples']} × {row['tokens']}",
            f"{1000 * row['seconds']:.0f}",
            f"{row['samples_per_second']:.1f}",
            f"{row['useful_tflops']:.0f}",
            f"{row['peak_gb']:.1f}",
        ]
        for row in _rows(document, "pass")
        if "beside" not in row["name"]
    ]
    return _table(["Pass", "Samples × tokens", "ms", "Samples/s", "Useful TFLOP/s", "Peak GB"], lines, 2)


def two_gpus(document: dict[str, Any]) -> str:
    """One card against a pipeline over two, and a model that one card cannot hold."""
    lines = [
        [
            row["name"],
            str(row["workers"]),
            str(row["clients"]),
            f"{row['steps_per_second']:.1f}",
            f"{row['p50_ms']:,.0f}",
            f"{row['useful_tflops']:.0f}",
            " + ".join(f"{gb:.1f}" for gb in row["weights_gb"]),
            " + ".join(f"{gb:.0f}" for gb in row["peak_gb"]),
        ]
        for row in _rows(document, "host")
    ]
    head = ["Model", "Workers", "Clients", "Steps/s", "p50, ms", "Useful TFLOP/s", "Weights, GB", "Peak GB"]
    return _table(head, lines)


def clients(document: dict[str, Any]) -> str:
    """Steps a second and latencies over clients and lengths."""
    found = _rows(document, "clients")
    lengths = sorted({row["tokens"] for row in found})
    lines = []
    for key in dict.fromkeys((row["engine"], row["name"], row["clients"]) for row in found):
        own = {row["tokens"]: row for row in found if (row["engine"], row["name"], row["clients"]) == key}
        cells = [
            f"{own[length]['steps_per_second']:.1f} ({own[length]['p50_ms']:.0f}, {own[length]['p99_ms']:.0f})"
            if length in own
            else "-"
            for length in lengths
        ]
        lines.append([key[0], key[1], str(key[2]), *cells])
    head = ["Host", "Steps are computed", "Clients", *(f"{length:g} tokens" for length in lengths)]
    return _table(head, lines, 2)


def path(document: dict[str, Any]) -> str:
    """The whole way against the same batch in this process."""
    lines = [
        [
            row["engine"],
            str(row["tokens"]),
            str(row["turn"] + 1),
            f"{row['in_process']:.1f}",
            f"{row['over_tls']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['pass_ms']:.0f}",
        ]
        for row in _rows(document, "path")
    ]
    head = [
        "Host",
        "Tokens",
        "Turn",
        "In process, samples/s",
        "Over TLS, samples/s",
        "Ratio",
        "ms of a pass in the host",
    ]
    return _table(head, lines)


def wire(document: dict[str, Any]) -> str:
    """Bytes of each exchange."""
    found = _rows(document, "bytes")
    full = found[0]["bytes_per_sample_step"]
    lines = [
        [
            row["name"],
            f"{row['bytes_per_sample_step'] / 1000000.0:.2f}",
            f"{full / row['bytes_per_sample_step']:.1f} ×",
            f"{row['once_per_sample'] / 1000000.0:.2f}",
        ]
        for row in found
    ]
    return _table(["Exchange", "MB a sample and step", "Less than full", "MB once a sample"], lines)


def client(document: dict[str, Any]) -> str:
    """What a client holds."""
    lines = [
        [
            row["name"],
            f"{row['weights_gb']:.2f}",
            f"{row.get('disk_gb', row['weights_gb']):.2f}",
            f"{row['peak_gb']:.2f}",
            f"{1000 * row['seconds']:.0f}",
        ]
        for row in _rows(document, "client")
    ]
    return _table(
        [
            "Client",
            "Weights in memory, GB",
            "on disk, GB",
            "Peak of GPU memory, GB",
            "ms a step of its own",
        ],
        lines,
    )


def faults(document: dict[str, Any]) -> str:
    """What became of gradients, clients and memory."""
    lines = []
    for row in _rows(document, "fault"):
        memory = f"{row['memory_over_base']:.3f}" if "memory_over_base" in row else "-"
        refused = str(row.get("refused_busy", "-"))
        lines.append(
            [row["name"], str(row["compared"]), str(row["wrong"]), str(row["errors"]), refused, memory]
        )
    head = ["Scene", "Gradients compared", "Wrong", "Failures", "Refused as busy", "Memory after over before"]
    return _table(head, lines)


def plot(document: dict[str, Any], target: Path) -> None:
    """Tokens a second against clients, one line a length."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "fednano"  # the same picture, the same file
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    found = [row for row in _rows(document, "clients") if row["name"] == "together"]
    for engine, style in (("plain", "-o"), ("compiled", "--s"), ("compiled, CUDA graphs", ":^")):
        for length in sorted({row["tokens"] for row in found if row["engine"] == engine}):
            own = [row for row in found if row["engine"] == engine and row["tokens"] == length]
            axes.plot(
                [row["clients"] for row in own],
                [row["tokens_per_second"] for row in own],
                style,
                label=f"{engine}, {length:g} tokens",
            )
    axes.set(
        xscale="log", yscale="log", xlabel="clients, each with one sample a step", ylabel="tokens a second"
    )
    counts = sorted({row["clients"] for row in found})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    plot(read_results(RESULTS), RESULTS.with_suffix(".svg"))
