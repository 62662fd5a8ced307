"""The feature cache: never computes twice, never serves a stale or damaged entry."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fednano.data import Sample
from fednano.errors import DataError
from fednano.models.edge import EdgePart
from fednano.models.language import LocalLLM
from fednano.training.features import FeatureCache

Parts = tuple[EdgePart, LocalLLM]


def test_features_are_the_encoders_and_computed_once(parts: Parts, samples: list[Sample]) -> None:
    edge = parts[0]
    cache = FeatureCache(edge)
    got = cache.get(samples)
    images = [sample for sample in samples if sample.image is not None]
    assert cache.encoded == len(images)
    again = cache.get(list(reversed(samples)))
    assert cache.encoded == len(images)
    for sample, features, twin in zip(samples, got, reversed(again), strict=True):
        if sample.image is None:
            assert features is None is twin
            continue
        pixels = edge.preprocess([Image.open(sample.image).convert("RGB")])
        torch.testing.assert_close(features, edge.encode(pixels)[0], rtol=1e-5, atol=1e-6)
        assert features is not None
        assert twin is not None
        assert features.equal(twin)


def test_another_process_of_the_site_reads_what_one_encoded(
    parts: Parts, samples: list[Sample], tmp_path: Path
) -> None:
    first, second = FeatureCache(parts[0], tmp_path), FeatureCache(parts[0], tmp_path)
    expected = first.get(samples)
    got = second.get(samples)
    assert second.encoded == 0
    assert all(
        a is b is None or (a is not None and b is not None and a.equal(b))
        for a, b in zip(expected, got, strict=True)
    )
    folder = next(tmp_path.iterdir())
    assert folder.stat().st_mode & 0o077 == 0


def test_features_from_disk_keep_no_file_mapped(parts: Parts, samples: list[Sample], tmp_path: Path) -> None:
    FeatureCache(parts[0], tmp_path).get(samples)
    cache = FeatureCache(parts[0], tmp_path)
    got = [features for features in cache.get(samples) if features is not None]
    assert cache.encoded == 0
    (shard,) = tmp_path.glob("*/*.safetensors")
    del cache
    gc.collect()
    assert len(got) > 1
    assert str(shard) not in Path("/proc/self/maps").read_text()


def test_a_changed_image_is_encoded_again(parts: Parts, samples: list[Sample], tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    assert samples[0].image is not None
    shutil.copyfile(samples[0].image, path)
    sample = Sample(id="x", image=path, question="what?", answer="red")
    old = FeatureCache(parts[0], tmp_path / "cache").get([sample])[0]
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)
    cache = FeatureCache(parts[0], tmp_path / "cache")
    new = cache.get([sample])[0]
    assert cache.encoded == 1
    assert old is not None
    assert new is not None
    assert not old.equal(new)


def test_a_damaged_shard_is_computed_again(parts: Parts, samples: list[Sample], tmp_path: Path) -> None:
    expected = FeatureCache(parts[0], tmp_path).get(samples)
    shard = next(tmp_path.rglob("*.safetensors"))
    cache = FeatureCache(parts[0], tmp_path)  # knows the shard, then it is damaged
    shard.write_bytes(shard.read_bytes()[:100])
    got = cache.get(samples)
    assert cache.encoded > 0
    for a, b in zip(expected, got, strict=True):
        assert a is b is None or (a is not None and b is not None and a.equal(b))


def test_memory_stays_within_its_budget(parts: Parts, samples: list[Sample]) -> None:
    one = FeatureCache(parts[0])
    one.get(samples[:1])
    cache = FeatureCache(parts[0], memory_bytes=3 * one.bytes_per_image)
    images = [sample for sample in samples if sample.image is not None]
    for sample in images:
        cache.get([sample])
    cache.get([images[-1]])
    assert cache.encoded == len(images)
    cache.get([images[0]])
    assert cache.encoded == len(images) + 1


def test_a_missing_image_is_named(parts: Parts, tmp_path: Path) -> None:
    sample = Sample(id="x", image=tmp_path / "gone.png", question="what?", answer="red")
    with pytest.raises(DataError, match=r"gone\.png cannot be read"):
        FeatureCache(parts[0]).get([sample])
