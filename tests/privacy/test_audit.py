"""The audit: attacks that work where nothing protects, and fail where everything is noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fednano.cli.commands import app
from fednano.data import Sample
from fednano.errors import ConfigError
from fednano.federation.config import RunConfig
from fednano.federation.model import build_edge
from fednano.federation.simulation import simulate
from fednano.privacy.audit import audit_run
from fednano.privacy.audit.wire import Protection, images_from_features, received, words_from_embeddings
from fednano.runs import make_view
from fednano.training.features import FeatureCache

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "black": (5, 5, 5)}


def samples(folder: Path, count: int) -> list[Sample]:
    made = []
    for n in range(count):
        name, colour = list(COLOURS.items())[n % 4]
        path = folder / f"{n}.png"
        pixels = np.full((64, 64, 3), 240, np.uint8)
        pixels[8 + n % 24 : 40 + n % 24, 10:50] = colour
        Image.fromarray(pixels).save(path)
        question = ["what color is it?", "is there a shape?"][n % 2]
        made.append(Sample(id=str(n), image=path, question=question, answer=name))
    return made


def test_noise_and_number_formats_on_the_wire() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 32, generator=draw)
    assert torch.equal(received(rows, Protection("float32"), draw), rows)
    for dtype, error in (("bfloat16", 0.01), ("float16", 0.001), ("int8", 0.01)):
        seen = received(rows, Protection(dtype), draw)
        assert 0 < float((seen - rows).norm() / rows.norm()) < error
    noised = received(rows, Protection("float32", 2.0), draw)
    assert float((noised - rows).std() / rows.square().mean().sqrt()) == pytest.approx(2.0, rel=0.1)


def test_words_and_images_leak_as_they_are_and_not_through_enough_noise(tmp_path: Path) -> None:
    edge, made = build_edge(RunConfig(rank=4)), samples(tmp_path, 24)
    cache = FeatureCache(edge.edge, None)
    levels = [Protection("float32"), Protection("int8"), Protection("float32", 100.0)]
    words = words_from_embeddings(edge, made[:8], levels, cache, 0)
    by_setting = {(f.setting, f.attacker): f.value for f in words}
    assert all(rate == 1.0 for (setting, _), rate in by_setting.items() if "noise" not in setting)
    assert all(rate < 0.3 for (setting, _), rate in by_setting.items() if "noise" in setting)
    images, picture = images_from_features(edge, made[:8], made[8:], levels, cache, 0)
    plain, small, noise = (finding.value for finding in images)
    assert plain > images[0].chance + 2
    assert small > images[0].chance + 2
    assert noise < images[0].chance + 1
    assert picture is not None
    assert picture.width == 2 * picture.height  # eight images wide, the originals and three settings high


def test_a_run_is_audited_from_the_command_line(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for split, count in (("train", 64), ("test", 16)):
        rows = []
        for sample in samples(data / "images", count):
            image = f"images/{Path(str(sample.image)).name}"
            rows.append({"image": image, "question": sample.question, "answer": sample.answer})
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(
        dataset=str(data),
        clients=2,
        rounds=1,
        samples=8,
        batch_size=4,
        rank=4,
        alpha=5.0,
        holdout=0.2,
        evaluate_every=0,
        final_samples=2,
        placement="local",
        runs_dir=str(tmp_path / "runs"),
    )
    path = simulate(config, backend="inprocess", view=make_view("quiet"))
    asked = ["privacy", "audit", path.name, "--runs-dir", str(tmp_path / "runs"), "--samples", "8", "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found == json.loads((path / "privacy-audit.json").read_text())["findings"]
    attacks = {finding["attack"] for finding in found}
    assert attacks == {
        "answers from updates",
        "membership from updates",
    }  # without a host, nothing travels each step
    assert len({finding["setting"] for finding in found}) == 3
    assert all(0.0 <= finding["value"] <= 1.0 for finding in found)
    with pytest.raises(ConfigError, match="noise"):
        audit_run(path.name, runs_dir=tmp_path / "runs", noise=[-1.0])
