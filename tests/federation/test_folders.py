"""A simulation of folders divides the data as the sites that hold the folders do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fednano.federation.config import RunConfig
from fednano.federation.model import hold_out, load_data, load_site_data, partition_samples


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_simulated_folders_are_read_as_their_sites_read_them(tmp_path: Path, holdout: float) -> None:
    sites = ("north", "south", "west")
    for count, site in enumerate(sites, 7):
        folder = tmp_path / "sites" / site
        folder.mkdir(parents=True)
        rows = [{"id": f"{site}-{n}", "question": f"what is {n}?", "answer": "red"} for n in range(count)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(dataset=str(tmp_path), clients=3, partition="folders", holdout=holdout)
    together = load_data(config)
    for number, site in enumerate(sites):
        alone = load_site_data(config, str(tmp_path / "sites" / site))
        theirs = hold_out(config, alone, range(len(alone)))
        ours = partition_samples(config, together, number, 3)
        assert [[s.id for s in part] for part in ours] == [
            [f"{site}/{s.id}" for s in part] for part in theirs
        ]
