"""fednano against an app written as FlowerTune's are, on the same tiny model and data: ``results/flowertune.json``.

    .venv/bin/python benchmarks/flowertune.py [--rounds 10] [--repeats 3] [--small]

The peer (``peers/flowertune``) puts PEFT LoRA on the whole model at each client and averages with Flower's FedAvg. Both
read the same folders (one for each site, easy-VQA divided by a Dirichlet draw), run in Flower's simulation with one
core a client, draw as many samples a round in batches of the same size, and are judged before and after by exact match
on the same questions. Repeats are interleaved, with a seed each. The peer is run with each of
``--peer-learning-rates``; the row takes the one that is best on the test questions, which is in its favour. Seconds to
the first round are from the start of the process to the first merge: start-up, loading, zero-shot evaluation, a round.
Memory is the largest resident set of a simulated client's process; a host's is apart.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from results import Gate, write_results

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "flowertune.json"
PEER = HERE / "peers" / "flowertune"
CLIENT = "ray::ClientAppActor"


def write_data(folder: Path, clients: int, rows: int, test: int, seed: int) -> None:
    """One folder for each site with ``train.jsonl`` of at most ``rows`` and images, and ``test.jsonl`` beside them."""
    from fednano.data import load_easy_vqa, partition

    train, held = load_easy_vqa("train"), load_easy_vqa("test")
    parts = partition(train.labels, clients=clients, alpha=0.3, seed=seed, min_samples=50)
    for number, part in enumerate(parts):
        _write_rows(folder / "sites" / f"site-{number}", "train", [train[int(k)] for k in part[:rows]])
    _write_rows(folder, "test", list(held)[:: max(1, len(held) // test)][:test])


def _write_rows(folder: Path, split: str, samples: list[Any]) -> None:
    (folder / "images").mkdir(parents=True)
    lines = []
    for sample in samples:
        name = f"{split}-{sample.image.name}"
        if not (folder / "images" / name).exists():
            shutil.copyfile(sample.image, folder / "images" / name)
        lines.append(json.dumps({"image": name, "question": sample.question, "answer": sample.answer}))
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


class Memory:
    """The largest resident set of the processes below one, by kind, sampled five times a second."""

    def __init__(self, pid: int) -> None:
        self.most = {"client": 0, "host": 0}
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        while not self._over.wait(0.2):
            try:
                below = psutil.Process(self._pid).children(recursive=True)
            except psutil.Error:
                return
            for each in below:
                try:
                    words, size = each.cmdline(), each.memory_info().rss
                except psutil.Error:
                    continue
                if words and words[0].startswith(CLIENT):
                    self.most["client"] = max(self.most["client"], size)
                elif "fednano.host" in words:
                    self.most["host"] = max(self.most["host"], size)


def watch(command: list[str], folder: Path, take: Any) -> Memory:
    """Run a program, hand each line of its output to ``take`` with the time, and watch memory. Raises SystemExit."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PEER), os.environ.get("PYTHONPATH", "")])),
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_TELEMETRY_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    log, said = folder / "stderr.log", ""
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder, env=environment
        ) as process,
        Memory(process.pid) as memory,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            take(line.rstrip("\n"), time.time())
            said = (said + line)[-2000:]
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}:\n{said}\n{log.read_text()[-2000:]}")
    return memory


def row_of(
    system: str, began: float, started: dict[int, float], done: dict[int, float], **more: Any
) -> dict[str, Any]:
    """The columns that both have."""
    rounds = [done[number] - started[number] for number in sorted(done)]
    return {
        "system": system,
        "seconds_to_first_round": done[1] - began,
        "seconds_per_round": fmean(rounds[1:] or rounds),
        "seconds_of_round_1": rounds[0],
        **more,
    }


def run_fednano(data: Path, work: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run of `fednano simulate`."""
    command = [
        str(Path(sys.executable).with_name("fednano")), "simulate", "--progress", "plain", "--data", str(data),
        "--partition", "folders", "--clients", str(options.clients), "--rounds", str(options.rounds), "--samples",
        str(options.samples), "--batch-size", "16", "--holdout", "0", "--evaluate-every", "0", "--evaluate-samples",
        str(options.test), "--seed", str(seed),
        "--runs-dir", str(work / "runs"),
    ]  # fmt: skip
    started: dict[int, float] = {}
    done: dict[int, float] = {}

    def take(line: str, now: float) -> None:
        words = line.partition("] ")[2].split()
        if len(words) > 2 and words[0] == "round" and words[2] in ("started", "merged", "merged:"):
            number = int(words[1].partition("/")[0])
            (started if words[2] == "started" else done).setdefault(number, now)

    began = time.time()
    memory = watch(command, work, take)
    [folder] = (path for path in (work / "runs").iterdir() if not path.is_symlink())
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sent = [
        r["bytes"] for r in lines if r["phase"] == "federated" and r["scope"] == "global" and "bytes" in r
    ]
    planes = {plane: fmean(each.get(plane, 0) for each in sent) / options.clients for plane in sent[0]}
    return row_of(
        "fednano", began, started, done, accuracy=summary["accuracy"]["federated"],
        zero_shot=summary["accuracy"]["zero_shot"], client_bytes=memory.most["client"],
        host_bytes=memory.most["host"], adapter_bytes=planes["adapter_up"] + planes["adapter_down"],
        activation_bytes=planes["activation_up"] + planes["activation_down"],
        client_parameters=summary["parameters"]["edge"], learning_rate=0.003,
    )  # fmt: skip


def run_peer(data: Path, work: Path, options: argparse.Namespace, seed: int, rate: float) -> dict[str, Any]:
    """One run of the peer."""
    import fednano

    tiny = Path(fednano.__file__).parent / "models" / "tiny"
    settings = {
        "model": str(tiny), "data": str(data), "rounds": options.rounds, "samples": options.samples,
        "learning-rate": rate, "test-samples": options.test, "seed": seed,
    }  # fmt: skip
    events: list[dict[str, Any]] = []

    def take(line: str, now: float) -> None:
        if line.startswith('{"event"'):
            events.append(json.loads(line))

    began = time.time()
    memory = watch(
        [sys.executable, str(HERE / "peers" / "run_flowertune.py"), json.dumps(settings)], work, take
    )
    times = {
        kind: {each["round"]: each["time"] for each in events if each["event"] == kind}
        for kind in ("started", "done")
    }
    scores = [each["value"] for each in events if each["event"] == "accuracy"]
    sent = [(each["up"] + each["down"]) / each["clients"] for each in events if each["event"] == "done"]
    return row_of(
        "flowertune-style", began, times["started"], times["done"], accuracy=scores[-1], zero_shot=scores[0],
        client_bytes=memory.most["client"], host_bytes=0, adapter_bytes=fmean(sent), activation_bytes=0.0,
        client_parameters=json.loads((tiny / "pretraining.json").read_text())["parameters"], learning_rate=rate,
    )  # fmt: skip


def code_lines(path: Path) -> int:
    """Lines of code or settings: neither empty nor comment nor docstring."""
    text = path.read_text()
    skipped: set[int] = set()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                skipped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        1
        for number, line in lines
        if number not in skipped and line.strip() and not line.strip().startswith("#")
    )


def user_lines() -> dict[str, dict[str, int]]:
    """What a user writes: the files of the peer, and of the app that `fednano init` makes."""
    from fednano.cli.init import scaffold

    with tempfile.TemporaryDirectory() as place:
        made = scaffold("app", Path(place))
        own = [*made.glob("app_app/*.py")]
        recipe = tomllib.loads((made / "pyproject.toml").read_text())
        ours = {"code": sum(map(code_lines, own)), "settings": len(recipe["tool"]["flwr"]["app"]["config"])}
    config = tomllib.loads((PEER / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    theirs = {"code": sum(map(code_lines, PEER.glob("*.py"))), "settings": len(config)}
    return {"fednano": ours, "flowertune-style": theirs}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a system, of medians over repeats (accuracy: mean), at the peer's best learning rate."""
    lines = user_lines()
    found = []
    for system in ("fednano", "flowertune-style"):
        mine = [row for row in rows if row["system"] == system]
        rates = sorted({row["learning_rate"] for row in mine})
        best = max(rates, key=lambda rate: fmean(r["accuracy"] for r in mine if r["learning_rate"] == rate))
        own = [row for row in mine if row["learning_rate"] == best]
        numbers = [key for key, value in own[0].items() if isinstance(value, (int, float)) and key != "seed"]
        middle = {key: (fmean if key == "accuracy" else median)(row[key] for row in own) for key in numbers}
        found.append(
            {
                "system": system,
                "summary": True,
                "lines_of_code": lines[system]["code"],
                "settings": lines[system]["settings"],
                **middle,
                "repeats": len(own),
            }
        )
    return found


def gates(table: list[dict[str, Any]]) -> list[Gate]:
    """Ours over theirs, where less is better, and points of accuracy below."""
    ours, theirs = table
    return [
        Gate("lines_of_code_over_peer", ours["lines_of_code"] / theirs["lines_of_code"], 0.5, "<="),
        Gate(
            "client_parameters_over_peer", ours["client_parameters"] / theirs["client_parameters"], 1.0, "<="
        ),
        Gate("adapter_bytes_over_peer", ours["adapter_bytes"] / theirs["adapter_bytes"], 1.0, "<="),
        Gate("accuracy_below_peer", theirs["accuracy"] - ours["accuracy"], 0.02, "<="),
    ]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=300, help="of a client and round")
    parser.add_argument("--test", type=int, default=1000, help="questions of the first and last evaluation")
    parser.add_argument("--rows", type=int, default=3000, help="of a site, at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-learning-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--small", action="store_true", help="only see that it works: seconds of training")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.small:
        options.clients, options.rounds, options.samples, options.test, options.repeats = 2, 2, 16, 32, 1
        options.rows = 100
        options.peer_learning_rates = [3e-3]
    rows: list[dict[str, Any]] = []
    for seed in range(options.repeats):
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            write_data(root / "data", options.clients, options.rows, options.test, seed)
            for number, rate in enumerate([None, *options.peer_learning_rates]):
                work = root / f"work-{number}"
                work.mkdir()
                if rate is None:
                    row = run_fednano(root / "data", work, options, seed)
                else:
                    row = run_peer(root / "data", work, options, seed, rate)
                rows.append(row | {"seed": seed})
                print(json.dumps(rows[-1]), flush=True)
        table = summarise(rows)  # each repeat is whole, and what is measured stays measured
        write_results(options.json, rows=[*table, *rows], gates=gates(table))
    for each in table:
        print(json.dumps(each))


if __name__ == "__main__":
    main()
