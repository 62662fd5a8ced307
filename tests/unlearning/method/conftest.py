"""A tiny random LLaVA in this process, a text set, and tuned adapters away from their start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fednano.adapters import create
from fednano.data import Sample, load_dataset, load_easy_vqa
from fednano.federation.config import RunConfig
from fednano.federation.messages import HostTicket
from fednano.federation.model import build_edge, connect
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.language import LocalLLM
from fednano.models.load import split_model
from fednano.runs import RunFolder
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.unlearning.retrain import retrain
from fednano.unlearning.sites import Site

WORDS = ["red", "circle", "square blue", "yes", "no", "green triangle", "is there", "what color"]


@pytest.fixture(scope="session")
def parts() -> tuple[EdgePart, LocalLLM]:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=32,
        ),
        text_config=LlamaConfig(
            vocab_size=200,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        ),
        image_token_index=4,
        vision_feature_layer=-1,
    )
    torch.manual_seed(7)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)  # far from uniform: a model that prefers some words to others
    edge, language = split_model(model, "tiny")
    return edge, LocalLLM(language)


@pytest.fixture(scope="session")
def texts() -> list[Sample]:
    return [
        Sample(id=str(i), image=None, question=f"{WORDS[i % 8]} {WORDS[i % 3]}?", answer=WORDS[(3 * i) % 8])
        for i in range(12)
    ]


Tuned = Callable[..., NanoEdge]


@pytest.fixture
def tuned(parts: tuple[EdgePart, LocalLLM]) -> Tuned:
    """Makes a NanoEdge whose adapters have moved, as if tuned."""

    def make(kind: str = "nano", **options: object) -> NanoEdge:
        adapters = {"image": create(kind, **options), "text": create(kind, **options)}
        nano = NanoEdge(parts[0], adapters, seed=0)
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for leaf in nano.layers.parameters():
                leaf.copy_(0.3 * torch.randn(leaf.shape, generator=generator))
        return nano

    return make


@pytest.fixture
def data(tuned: Tuned, parts: tuple[EdgePart, LocalLLM], texts: list[Sample]) -> ClientData:
    return ClientData(texts, tuned(rank=2), FeatureCache(parts[0]))


@dataclass(frozen=True)
class Finished:
    """A finished run of two sites, and what they hold.

    Attributes:
        path: the run folder.
        sites: by name.
        secret: ids of what one site has memorised and nobody else has.
    """

    path: Path
    sites: dict[str, Site]
    secret: tuple[str, ...]


@pytest.fixture(scope="session")
def small_vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small-vqa")
    (folder / "images").mkdir()
    for split, count in (("train", 40), ("test", 16)):
        rows = []
        for sample in list(load_easy_vqa(split))[:count]:
            assert sample.image is not None
            name = f"{split}-{sample.image.name}"
            shutil.copyfile(sample.image, folder / "images" / name)
            rows.append({"image": name, "question": sample.question, "answer": sample.answer})
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def finished(small_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two sites, tuned by the very rounds that retraining repeats; one of them with a secret of its own."""
    folder = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    config = RunConfig(
        dataset=str(small_vqa),
        clients=2,
        rounds=3,
        samples=32,
        learning_rate=0.01,
        batch_size=8,
        rank=4,
        evaluate_samples=4,
        placement="local",
        runs_dir=str(folder),
        cache_dir=str(folder / "cache"),
    )
    easy = list(load_dataset(str(small_vqa), "train"))
    secret = [
        Sample(id=f"secret/{i}", image=None, question=f"what color is door {i}?", answer="green")
        for i in range(12)
    ]
    sites = {
        "client-000": Site(easy[:16], easy[36:]),
        "client-001": Site([*easy[16:32], *secret], easy[32:36]),
    }
    edge = build_edge(config)
    run = RunFolder.create(folder, "unlearning", config.to_mapping())
    run.write_json(
        "partition.json", {"kind": "dirichlet", "samples": {n: len(s.train) for n, s in sites.items()}}
    )
    with connect(config, HostTicket()) as llm:
        features = FeatureCache(edge.edge, folder / "cache")
        data = {name: ClientData(site.train, edge, features) for name, site in sites.items()}
        start = (0, edge.travelling(), {})
        for done in retrain(config, edge, llm, data, {}, start, stop=lambda: False):
            run.save_checkpoint(
                done.round, {f"leaf.{name}": leaf for name, leaf in done.leaves.items()}, {}, keep_last=9
            )
            for name in sites:
                row = {"phase": "federated", "round": done.round, "scope": "client", "client": name}
                run.append_metrics({**row, "loss": done.loss, "samples": config.samples})
        language = llm.part.fingerprint
    run.save_adapter(done.leaves, {"edge": edge.edge.fingerprint, "language": language})
    run.close()
    return Finished(run.path, sites, tuple(sample.id for sample in secret))
