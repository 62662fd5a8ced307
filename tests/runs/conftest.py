"""A run folder with measured content: a split model in miniature, trained on easy-VQA by federated averaging.

Each client maps features of image and question through its adapter, ``z = x A``; a frozen random head stands for
the language host. All numbers in the folder come from this training, and all bytes from the arrays that it passes
around. It takes a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fednano.data import Dataset, Sample, decode_image, load_easy_vqa, partition, summarise_partition
from fednano.evaluation import exact_match
from fednano.runs import Phase, RunFolder, Summary
from fednano.runs.summary import installed_versions

Array = np.ndarray[Any, np.dtype[np.float32]]
WIDTH, BATCH, LEARNING_RATE = 48, 32, 0.5


class Miniature:
    """The model in miniature and its data."""

    def __init__(self, clients: int, rounds: int, samples: int, test: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.clients, self.rounds, self.samples, self.seed = clients, rounds, samples, seed
        train, held = load_easy_vqa("train"), load_easy_vqa("test")
        self.parts = partition(train.labels, clients=clients, alpha=0.3, seed=seed, min_samples=50)
        self.partition = summarise_partition(
            self.parts,
            train.labels,
            kind="dirichlet",
            alpha=0.3,
            seed=seed,
            clients=[f"client-{k}" for k in range(clients)],
        )
        self.labels = list(train.label_names)
        self.words = sorted({word for sample in train for word in sample.question.rstrip("?").split()})
        self.train = {k: train.subset(part[: samples + 80]) for k, part in enumerate(self.parts)}
        self.test = held.subset(range(0, len(held), len(held) // test))[:test]
        self.size = len(self.words) * 7 + 1
        self.head = self.rng.normal(size=(WIDTH, len(self.labels))).astype(np.float32) / 7
        self.x = {k: self.features(data) for k, data in self.train.items()}
        self.y = {k: self.targets(data) for k, data in self.train.items()}
        self.x_test, self.y_test = self.features(self.test), self.targets(self.test)

    def features(self, data: Dataset) -> Array:
        """Words of the question times colours of the shape: (n, size)."""
        rows = np.zeros((len(data), self.size), np.float32)
        seen: dict[Path, Array] = {}
        for row, sample in zip(rows, data, strict=True):
            assert sample.image is not None
            if sample.image not in seen:
                seen[sample.image] = look(sample)
            words = np.array([word in sample.question.rstrip("?").split() for word in self.words], np.float32)
            row[:-1], row[-1] = np.outer(words, seen[sample.image]).ravel(), 1
        return rows

    def targets(self, data: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array([self.labels.index(sample.answer) for sample in data])

    def host(self, z: Array, y: Any) -> tuple[Array, Array]:
        """Losses (b,) and their gradient at z (b, width)."""
        logits = z @ self.head
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        at = np.arange(len(y))
        losses = -np.log(p[at, y] + 1e-12)
        p[at, y] -= 1
        return losses, p @ self.head.T

    def answers(self, adapter: Array) -> list[str]:
        best = (self.x_test @ adapter @ self.head).argmax(axis=1)
        return [self.labels[int(k)] for k in best]

    def judge(self, adapter: Array) -> tuple[float, float]:
        right = [exact_match(a, s.answer) for a, s in zip(self.answers(adapter), self.test, strict=True)]
        return float(np.mean(right)), float(self.host(self.x_test @ adapter, self.y_test)[0].mean())

    def local(self, client: int, adapter: Array) -> tuple[Array, dict[str, Any]]:
        began, adapter, sizes, losses = time.perf_counter(), adapter.copy(), [0, 0], []
        x, y = self.x[client], self.y[client]
        for start in range(0, self.samples, BATCH):
            rows = self.rng.integers(0, min(len(x), self.samples), size=min(BATCH, self.samples - start))
            z = x[rows] @ adapter
            loss, gradient = self.host(z, y[rows])
            sizes[0] += z.nbytes + y[rows].nbytes
            sizes[1] += loss.nbytes + gradient.nbytes
            losses.append(float(loss.mean()))
            adapter -= LEARNING_RATE * (x[rows].T @ gradient / len(rows)).astype(np.float32)
        facts = {"adapter_up": adapter.nbytes, "activation_up": sizes[0], "activation_down": sizes[1]}
        return adapter, {
            "loss": float(np.mean(losses)),
            "samples": self.samples,
            "seconds": time.perf_counter() - began,
            "bytes": facts,
        }


def look(sample: Sample) -> Array:
    """Mean colour of the shape, its spread, and how much of the image it covers: (7,)."""
    pixels = np.asarray(decode_image(sample.image), np.float32) / 255  # type: ignore[arg-type]
    shape = np.abs(pixels - pixels[0, 0]).sum(axis=2) > 0.2
    inside = pixels[shape] if shape.any() else pixels.reshape(-1, 3)
    return np.array([1.0, *inside.mean(axis=0), *inside.std(axis=0)], np.float32)


def make_run(
    root: Path, *, clients: int = 5, rounds: int = 8, samples: int = 200, test: int = 400, seed: int = 0
) -> RunFolder:
    """Train, and write everything through ``RunFolder``."""
    began = time.perf_counter()
    small = Miniature(clients, rounds, samples, test, seed)
    config = {
        "model": "miniature",
        "dataset": "easy-vqa",
        "clients": clients,
        "rounds": rounds,
        "samples": samples,
        "partition": "dirichlet",
        "alpha": 0.3,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "seed": seed,
    }
    run = RunFolder.create(root, "easy-vqa", config, command=["pytest", "tests/runs", "-k", "report"])
    run.write_json("partition.json", small.partition.to_json())
    start: Array = np.zeros((small.size, WIDTH), np.float32)
    start += small.rng.normal(size=start.shape).astype(np.float32) * 0.01
    wire = {"adapter_up": 0, "adapter_down": 0, "activation_up": 0, "activation_down": 0}
    zero, zero_loss = small.judge(start)
    run.append_metrics(
        {"phase": "zero_shot", "round": 0, "scope": "global", "accuracy": zero, "loss": zero_loss}
    )
    adapter = start
    for number in range(1, rounds + 1):
        parts = []
        for client in range(clients):
            own, record = small.local(client, adapter)
            where = {"phase": "federated", "round": number, "scope": "client", "client": f"client-{client}"}
            if (
                number == 2 and client == 3
            ):  # one update is damaged on its way; it counts as sent, not as merged
                own[0, 0] = np.nan
            for plane, count in record["bytes"].items():
                wire[plane] += count
            if np.isfinite(own).all():
                parts.append(own)
                run.append_metrics(where | record)
            else:
                run.append_metrics(where | {"refused": "leaf 'A' is not finite", "bytes": record["bytes"]})
        wire["adapter_down"] += clients * adapter.nbytes
        down = {"adapter_down": clients * adapter.nbytes}
        adapter = np.mean(parts, axis=0)
        accuracy, loss = small.judge(adapter)
        run.append_metrics(
            {
                "phase": "federated",
                "round": number,
                "scope": "global",
                "accuracy": accuracy,
                "loss": loss,
                "bytes": down,
            }
        )
        run.save_checkpoint(number, {"A": torch.from_numpy(adapter)}, {"round": number}, score=accuracy)
    ended = time.perf_counter()
    for client in range(clients):
        # judged on samples behind those that it trained on
        z, y = small.x[client][samples:] @ adapter, small.y[client][samples:]
        right = float((np.argmax(z @ small.head, axis=1) == y).mean())
        run.append_metrics(
            {
                "phase": "federated",
                "round": rounds,
                "scope": "client",
                "client": f"client-{client}",
                "final": True,
                "accuracy": right,
                "samples": len(y),
            }
        )
    alone = []
    for client in range(clients):
        own = start
        for _ in range(rounds):
            own, _record = small.local(client, own)
        alone.append(small.judge(own)[0])
    alone_ended = time.perf_counter()
    run.append_event("warning", "round 2: 4 of 5 updates were merged")
    run.save_adapter({"A": torch.from_numpy(adapter)}, {"adapter": "linear map"})
    before, after = small.answers(start), small.answers(adapter)
    rows = []
    for place in np.random.default_rng(seed).permutation(len(small.test))[:24].tolist():
        sample = small.test[place]
        assert sample.image is not None
        image = run.save_image(sample.image.stem, decode_image(sample.image))
        rows.append(
            {
                "image": image,
                "question": sample.question,
                "answer": sample.answer,
                "zero_shot": before[place],
                "federated": after[place],
            }
        )
    run.write_json("predictions.json", rows)
    steps = clients * rounds * samples
    final, final_loss = small.judge(adapter)
    run.write_summary(
        Summary(
            accuracy={"zero_shot": zero, "federated": final, "local_only": float(np.mean(alone))},
            bytes={
                "adapter_up_per_client_round": wire["adapter_up"] / (clients * rounds),
                "adapter_down_per_client_round": wire["adapter_down"] / (clients * rounds),
                "activation_up_per_sample_step": wire["activation_up"] / steps,
                "activation_down_per_sample_step": wire["activation_down"] / steps,
            },
            parameters={
                "model": adapter.size + small.head.size,
                "edge": adapter.size,
                "trainable": adapter.size,
            },
            rounds=rounds,
            clients=clients,
            seed=seed,
            wall_seconds=time.perf_counter() - began,
            rule="fedavg",
            adapter="linear map",
            model="miniature",
            dataset="easy-vqa",
            versions=installed_versions(),
            phases={
                "zero_shot": Phase(zero, loss=zero_loss, note="before tuning"),
                "federated": Phase(
                    final,
                    rounds=rounds,
                    seconds=ended - began,
                    loss=final_loss,
                    note=f"{clients} clients, averaged",
                ),
                "local_only": Phase(
                    float(np.mean(alone)),
                    rounds=rounds,
                    note=f"mean of {clients} clients",
                    seconds=alone_ended - ended,
                ),
            },
            test_samples=len(small.test),
            extra={"spread": {"local_only": [min(alone), max(alone)]}},
        )
    )
    run.close()
    return run


@pytest.fixture(scope="session")
def sample_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run; tests must not change it."""
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def summary_fields() -> Callable[[], dict[str, Any]]:
    """Fields of a valid summary, fresh each time."""

    def fields() -> dict[str, Any]:
        return {
            "accuracy": {"zero_shot": 0.5, "federated": 0.75},
            "bytes": {
                "adapter_up_per_client_round": 40960,
                "adapter_down_per_client_round": 40960.0,
                "activation_up_per_sample_step": 20000.5,
                "activation_down_per_sample_step": 18000,
            },
            "parameters": {"model": 2_350_000, "edge": 900_000, "trainable": 10_240},
            "rounds": 10,
            "clients": 5,
            "seed": 0,
            "wall_seconds": 63.5,
            "rule": "fedavg",
            "adapter": "nano",
            "versions": {"fednano": "0.1.0", "python": "3.11.9"},
        }

    return fields
