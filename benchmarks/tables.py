"""Write the tables of README and docs from the committed results, so that no number there is typed by hand.

A block between ``<!-- table: NAME -->`` and ``<!-- end -->`` is replaced by the table of that name. ``--check`` only
says whether every block is current.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import deployment_tables
import host_tables
import unlearning_tables
from results import read_results

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(
    ROOT / page
    for page in (
        "README.md",
        *(
            f"docs/{p}.md"
            for p in (
                "architecture",
                "adapters",
                "aggregation",
                "benchmarks",
                "deployment",
                "host",
                "privacy",
                "unlearning",
            )
        ),
    )
)
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _overall(document: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = next(row for row in document["rows"] if row["seed"] == "all")
    return row


def _spread(mean: float, deviation: float, count: int) -> str:
    """Mean and standard deviation in percent; one measurement has none."""
    return _percent(mean) + (f" ± {_percent(deviation)}" if count > 1 else "")


def main_job(document: dict[str, Any]) -> str:
    """Accuracy by seed, and the mean."""
    titles = {
        "zero_shot": "Before tuning",
        "local_only": "Each client alone (mean)",
        "federated": "**Federated, FedAvg** (default)",
        "fisher": "Federated, Fisher merging",
        "centralised": "All data in one place",
    }
    seeds = [row for row in document["rows"] if row["seed"] != "all"]
    overall = _overall(document)
    head = (
        "| Accuracy on the full test set, % | "
        + " | ".join(f"seed {row['seed']}" for row in seeds)
        + " | mean |"
    )
    lines = [head, "|---|" + "---:|" * (len(seeds) + 1)]
    for name, title in titles.items():
        cells = [_percent(row[name]) for row in seeds] + [_percent(overall[name]["mean"])]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def wire(document: dict[str, Any]) -> str:
    """What crosses the wire, of the first seed."""
    row = document["rows"][0]
    sizes, parameters = row["bytes"], row["parameters"]
    lines = [
        "| What | Size |",
        "|---|---:|",
        f"| Parameters: whole model / on a client / trained | {parameters['model']:,} / {parameters['edge']:,} / "
        f"{parameters['trainable']:,} |",
        f"| Adapter update, client to server, a round | {sizes['adapter_up_per_client_round'] / 1e3:.1f} kB |",
        f"| Adapters, server to client, a round | {sizes['adapter_down_per_client_round'] / 1e3:.1f} kB |",
        f"| Activations, client to host, a sample and step | {sizes['activation_up_per_sample_step'] / 1e3:.1f} kB |",
        f"| Gradients, host to client, a sample and step | {sizes['activation_down_per_sample_step'] / 1e3:.1f} kB |",
        f"| Activations and gradients over adapters, whole run | "
        f"{sizes['activation_total'] / sizes['adapter_total']:.0f} × |",
    ]
    return "\n".join(lines)


def adapters(document: dict[str, Any]) -> str:
    """Every adapter in the default job: accuracy, bytes, parameters and time, means over the seeds."""
    lines = [
        "| Adapter | Options | Learning rate | Accuracy, % | kB up, a round | Parameters | Seconds a round |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    finals = [row for row in document["rows"] if not row["sweep"]]
    most = max(row["cores"] for row in finals)
    for name in dict.fromkeys(row["adapter"] for row in finals):
        own = [row for row in finals if row["adapter"] == name]
        options = ", ".join(
            str(value) if key == "adapter_options" else f"{key}={value}"
            for key, value in own[0]["settings"].items()
        )
        accuracies = [row["accuracy"] for row in own]
        timed = all(row["cores"] == most for row in own)
        cells = [
            name,
            options or "defaults",
            f"{own[0]['learning_rate']:g}",
            _spread(fmean(accuracies), stdev(accuracies) if len(own) > 1 else 0.0, len(own)),
            f"{fmean(row['uplink_bytes'] for row in own) / 1e3:.1f}",
            f"{own[0]['trainable']:,}",
            f"{fmean(row['seconds_per_round'] for row in own):.1f}" if timed else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gates(document: dict[str, Any]) -> str:
    """What was promised, what was measured."""
    lines = ["| Gate | Measured | Promised | |", "|---|---:|---:|---|"]
    for gate in document["gates"]:
        sense = "≥" if gate["sense"] == ">=" else "≤"
        verdict = "met" if gate["met"] else "**missed**"
        lines.append(f"| {gate['name']} | {gate['value']:.4g} | {sense} {gate['bound']:.4g} | {verdict} |")
    return "\n".join(lines)


def study(document: dict[str, Any]) -> str:
    """Accuracy of each rule over heterogeneity, a table for each number of clients: mean and spread over seeds."""
    means = [row for row in document["rows"] if row["seed"] == "all"]
    return "\n\n".join(_study_of(means, clients) for clients in sorted({row["clients"] for row in means}))


def _study_of(means: list[dict[str, Any]], clients: int) -> str:
    found = {(row["rule"], row["alpha"]): row for row in means if row["clients"] == clients}
    alphas = sorted({alpha for _, alpha in found})
    head = f"| Accuracy, %, {clients} clients | " + " | ".join(f"alpha {alpha:g}" for alpha in alphas) + " |"
    lines = [head, "|---|" + "---:|" * len(alphas)]
    for rule in sorted({rule for rule, _ in found}):
        rows = [found.get((rule, alpha)) for alpha in alphas]
        cells = [
            _spread(row["accuracy"]["mean"], row["accuracy"]["sd"], row["seeds"]) + f" ({row['seeds']})"
            if row
            else "-"
            for row in rows
        ]
        note = " (by its clients)" if any(row and row["judged"] == "clients" for row in rows) else ""
        lines.append(f"| {rule}{note} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def codecs(document: dict[str, Any]) -> str:
    """Bytes and accuracy of each codec, means over the seeds."""
    by_codec: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        by_codec.setdefault(row["codec"], []).append(row)
    whole = fmean(row["uplink_bytes"] for row in by_codec["fp32"])
    lines = [
        "| Codec | kB up, a client and round | of fp32 | Accuracy, % | Seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, rows in by_codec.items():
        size = fmean(row["uplink_bytes"] for row in rows)
        accuracy = _percent(fmean(row["accuracy"] for row in rows))
        lines.append(f"| {name} | {size / 1e3:.1f} | {size / whole:.3f} | {accuracy} | {len(rows)} |")
    return "\n".join(lines)


def merging(document: dict[str, Any]) -> str:
    """Milliseconds per update of the streaming rules and of Flower's FedAvg."""
    titles = {
        "flower_fedavg": "Flower's FedAvg",
        "fedavg": "FedAvg",
        "fisher": "Fisher",
        "fedavg_torch": "FedAvg, torch only",
        "fisher_torch": "Fisher, torch only",
    }
    lines = [
        "| Per update of 1 MB | ms | Flower's time over it | Over FedAvg's time |",
        "|---|---:|---:|---:|",
    ]
    for row in document["rows"]:
        if row["measure"] == "speed":
            lines.append(
                f"| {titles[row['rule']]} | {row['milliseconds_per_update']:.2f} | "
                f"{row['times_faster_than_flower']:.2f} | {row['times_slower_than_fedavg']:.2f} |"
            )
    return "\n".join(lines)


def robustness(document: dict[str, Any]) -> str:
    """Accuracy of each rule without and with sign-flippers, mean over seeds."""
    rows = document["rows"]
    cells = sorted(
        {(row["clients"], row["partition"]) for row in rows}, key=lambda cell: (cell[1] != "iid", cell[0])
    )
    titles = [f"{clients} clients, {partition}" for clients, partition in cells]
    lines = ["| Accuracy, %: clean → attacked | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(cells)]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        shown = []
        for clients, partition in cells:
            found: dict[bool, list[float]] = {False: [], True: []}
            for row in rows:
                if (row["rule"], row["clients"], row["partition"]) == (rule, clients, partition):
                    found[row["attacked"]].append(row["accuracy"])
            both = found[False] and found[True]
            shown.append(f"{_percent(fmean(found[False]))} → {_percent(fmean(found[True]))}" if both else "-")
        lines.append(f"| {rule} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def flowertune(document: dict[str, Any]) -> str:
    """fednano against an app written as FlowerTune's are: one column each."""
    rows = [row for row in document["rows"] if row.get("summary")]
    lines = ["| | " + " | ".join(row["system"] for row in rows) + " |", "|---|" + "---:|" * len(rows)]

    def add(title: str, write: Callable[[dict[str, Any]], str]) -> None:
        lines.append(f"| {title} | " + " | ".join(write(row) for row in rows) + " |")

    add("Lines of user code (and settings)", lambda row: f"{row['lines_of_code']} ({row['settings']})")
    add("Seconds to the first merged round", lambda row: f"{row['seconds_to_first_round']:.1f}")
    add("Seconds a round", lambda row: f"{row['seconds_per_round']:.1f}")
    add("Client memory, MB", lambda row: f"{row['client_bytes'] / 1e6:.0f}")
    add("Host memory, MB", lambda row: f"{row['host_bytes'] / 1e6:.0f}" if row["host_bytes"] else "-")
    add("Parameters on a client", lambda row: f"{row['client_parameters']:,.0f}")
    add("Adapter bytes, a client and round, kB", lambda row: f"{row['adapter_bytes'] / 1e3:.1f}")
    add(
        "Embeddings and gradients, a client and round, kB",
        lambda row: f"{row['activation_bytes'] / 1e3:,.0f}",
    )
    add("Accuracy, %", lambda row: _percent(row["accuracy"]))
    return "\n".join(lines)


def privacy(document: dict[str, Any]) -> str:
    """Accuracy over epsilon: whole clients and single samples protected."""
    lines = [
        "| Protected | Noise multiplier | ε | δ | Accuracy, % | Untuned, % | Seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    by_cell: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        by_cell.setdefault((row["unit"], row["noise"]), []).append(row)
    for (unit, noise), own in sorted(by_cell.items()):
        # How much of its data a client draws depends on how much the seed gave it, and epsilon on that.
        epsilons = sorted({f"{row['epsilon']:.2f}" for row in own if row["epsilon"] is not None}, key=float)
        spent = " to ".join(dict.fromkeys((epsilons[0], epsilons[-1]))) if epsilons else "not private"
        delta = "-" if own[0]["delta"] is None else f"{own[0]['delta']:.0e}"
        accuracy = _percent(fmean(row["accuracy"] for row in own))
        before = _percent(fmean(row["before"] for row in own))
        lines.append(f"| {unit}s | {noise:g} | {spent} | {delta} | {accuracy} | {before} | {len(own)} |")
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "main-job": ("main_job", main_job),
    "wire": ("main_job", wire),
    "study": ("study", study),
    "adapters": ("adapters", adapters),
    "adapters-gates": ("adapters", gates),
    "study-gates": ("study", gates),
    "merging": ("aggregation", merging),
    "merging-gates": ("aggregation", gates),
    "robustness": ("robustness", robustness),
    "robustness-gates": ("robustness", gates),
    "codecs": ("codecs", codecs),
    "codecs-gates": ("codecs", gates),
    "host-card": ("host", host_tables.card),
    "host-gates": ("host", gates),
    "host-passes": ("host", host_tables.passes),
    "host-clients": ("host", host_tables.clients),
    "host-path": ("host", host_tables.path),
    "host-wire": ("host", host_tables.wire),
    "host-client": ("host", host_tables.client),
    "host-faults": ("host", host_tables.faults),
    "host-two-gpus": ("host_two_gpus", host_tables.two_gpus),
    "flowertune": ("flowertune", flowertune),
    "kernels-gates": ("kernels", gates),
    "unlearning": ("unlearning", unlearning_tables.federation),
    "unlearning-gates": ("unlearning", gates),
    "unlearning-language": ("unlearning", unlearning_tables.language),
    "privacy": ("privacy", privacy),
    "secagg": ("secagg", deployment_tables.secagg),
    "secagg-gates": ("secagg", gates),
    "scale": ("scale", deployment_tables.scale),
    "scale-gates": ("scale", gates),
    "soak": ("soak", deployment_tables.soak),
    "soak-gates": ("soak", gates),
}


def rendered(text: str) -> str:
    """``text`` with every block written anew."""

    def table(match: re.Match[str]) -> str:
        source, write = TABLES[match["name"]]
        file = ROOT / "benchmarks" / "results" / f"{source}.json"
        if not file.exists():
            return f"{match[1]}*Not measured yet: `python benchmarks/{source}.py`.*\n{match[3]}"
        body = write(read_results(file))
        return f"{match[1]}{body}\n{match[3]}"

    return _BLOCK.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a block is not current"
    )
    options = parser.parse_args()
    stale = []
    for page in PAGES:
        before = page.read_text()
        after = rendered(before)
        if before != after:
            stale.append(page.name)
            if not options.check:
                page.write_text(after)
    if options.check and stale:
        print(f"not current: {', '.join(stale)}. Run: python benchmarks/tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
