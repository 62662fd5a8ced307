"""The report: what it says must follow from the files, whatever the files hold."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from fednano.errors import RunError
from fednano.runs import RunFolder, Summary, render_report
from fednano.runs.report_metrics import read_metrics
from fednano.runs.report_sections import interval
from fednano.runs.text import format_bytes, format_percent

NASTY = "<script>alert(1)</script><img src=x onerror=y>\"'&"
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.style = False
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.sources.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def render(run: RunFolder) -> tuple[str, Page]:
    text = render_report(run.path).read_text(encoding="utf-8")
    return text, Page(text)


def copy_of(run: RunFolder, root: Path) -> RunFolder:
    shutil.copytree(run.path, root / run.id)
    return RunFolder.open(root / run.id)


@pytest.fixture(scope="module")
def page(sample_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str, Page]:
    run = copy_of(sample_run, tmp_path_factory.mktemp("r"))
    return run, *render(run)


Rendered = tuple[RunFolder, str, Page]


def test_the_page_is_self_contained(page: Rendered) -> None:
    _, text, parsed = page
    assert parsed.sources
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert parsed.tags["script"] == parsed.tags["link"] == parsed.tags["iframe"] == 0
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert len(text) < 400_000


def test_the_same_folder_gives_the_same_bytes(page: Rendered) -> None:
    run, text, _ = page
    assert render(run)[0] == text
    assert str(run.path) not in text


def test_verdict_first(page: Rendered) -> None:
    run, _, parsed = page
    got = run.read_json("summary.json")
    before, after = got["accuracy"]["zero_shot"], got["accuracy"]["federated"]
    assert after > before + 0.2  # the run of the fixture has learnt something
    place = parsed.text.index(format_percent(after))
    assert place < parsed.text.index("Accuracy by phase")
    assert f"rose from {format_percent(before)} to {format_percent(after)}" in parsed.text
    assert f"{100 * (after - before):+.1f} points" in parsed.text
    assert f"on {got['test_samples']} test questions" in parsed.text


def test_every_phase_and_client_and_label_is_there(page: Rendered) -> None:
    run, _, parsed = page
    assert "Local only" in parsed.text
    division = run.read_json("partition.json")
    for client, counts in division["counts"].items():
        assert client in parsed.text
        assert f"{sum(counts):,}" in parsed.text
    for label in division["labels"]:
        assert label in parsed.text
    assert parsed.tags["article"] == len(run.read_json("predictions.json")) == 24
    assert parsed.tags["img"] == 24
    assert "leaf 'A' is not finite" in parsed.text
    assert "4 of 5 updates were merged" in parsed.text
    assert "pytest tests/runs -k report" in parsed.text
    for package in ("torch", "fednano", "python"):
        assert package in parsed.text


def test_bytes_and_the_factor_are_computed_from_the_log(page: Rendered) -> None:
    run, _, parsed = page
    planes: Counter[str] = Counter()
    for row in run.metrics():
        if row["phase"] == "federated":
            planes.update(row.get("bytes", {}))
    adapters = planes["adapter_up"] + planes["adapter_down"]
    activations = planes["activation_up"] + planes["activation_down"]
    assert activations > adapters > 0
    factor = f"{activations / adapters:.1f}".removesuffix(".0")
    assert f"Activations outweigh adapters on the wire by a factor of {factor}:" in parsed.text
    for count in planes.values():
        assert format_bytes(count) in parsed.text


@pytest.mark.parametrize(
    ("adapters", "activations", "sentence"),
    [
        (100, 12_345, "Activations outweigh adapters on the wire by a factor of 123:"),
        (1000, 2000, "Activations outweigh adapters on the wire by a factor of 2:"),
        (3000, 1000, "In this run adapters outweigh activations on the wire by a factor of 3:"),
        (3000, 0, "No activations crossed the wire"),
    ],
)
def test_the_wire_sentence_follows_the_numbers(
    adapters: int, activations: int, sentence: str, tmp_path: Path
) -> None:
    run = RunFolder.create(tmp_path, "x")
    row = {"phase": "federated", "round": 1, "scope": "global", "bytes": {"adapter_up": adapters}}
    run.append_metrics(row)
    run.append_metrics(row | {"scope": "client", "client": "0", "bytes": {"activation_up": activations}})
    assert sentence in render(run)[1].text


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (0.7, 0.931, "rose from 70.0 % to 93.1 %"),
        (0.7, 0.6, "fell from 70.0 %"),
        (0.7, 0.7001, "stayed at 70.0 % in 10 rounds"),
    ],
)
def test_a_loss_is_called_a_loss(
    before: float, after: float, words: str, summary_fields: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    run = RunFolder.create(tmp_path, "x")
    run.write_summary(Summary(**summary_fields() | {"accuracy": {"zero_shot": before, "federated": after}}))
    text, parsed = render(run)
    assert words in parsed.text
    assert ('class="hero down"' in text) == (after < before - 0.01)


FILES = [
    "config.json",
    "metrics.jsonl",
    "events.jsonl",
    "partition.json",
    "predictions.json",
    "summary.json",
    "images",
]


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_becomes_a_sentence(name: str, sample_run: RunFolder, tmp_path: Path) -> None:
    run = copy_of(sample_run, tmp_path)
    path = run.path / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    parsed = render(run)[1]
    if name == "images":
        assert parsed.text.count("no image") == 24
    elif name != "events.jsonl":
        assert f"{name} does not exist" in parsed.text
        assert str(tmp_path) not in parsed.text
    if name == "summary.json":
        assert "has not finished. After round 8 its accuracy was" in parsed.text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    parsed = render(RunFolder.create(tmp_path, "x", {"rounds": 3}))[1]
    assert "has not come to a result" in parsed.text
    assert "no round was finished" in parsed.text


CONTENTS = [
    "",
    "{",
    "[]",
    "{}",
    "null",
    "3",
    '"x"',
    "[[1]]",
    '{"a": [1, null]}',
    '{"labels": 3, "counts": []}',
]


@pytest.mark.parametrize("content", CONTENTS)
def test_damaged_files_do_not_stop_the_report(content: str, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x")
    for name in FILES[1:-1]:
        (run.path / name).write_text(content + "\n")
    parsed = render(run)[1]
    assert "On the wire" in parsed.text
    (run.path / "config.json").write_text(content)
    assert "Configuration" in render(run)[1].text


def test_odd_values_do_not_stop_the_report(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x", {"nothing": None, "yes": True, "list": [1, 2]})
    for change in (
        {"loss": math.nan},
        {"loss": "high"},
        {"accuracy": None},
        {"bytes": None},
        {"samples": None},
    ):
        run.append_metrics({"phase": "federated", "round": 1, "scope": "client", "client": "c", **change})
        run.append_metrics({"phase": "federated", "round": 2, "scope": "global", **change})
    run.write_json(
        "predictions.json", [{"question": 1, "answer": 2, "image": 3, "federated": None, "zero_shot": 2}]
    )
    run.write_json("partition.json", {"kind": "sites", "alpha": None, "labels": ["a"], "counts": {"c": [0]}})
    parsed = render(run)[1]
    assert "Each site's own data" in parsed.text
    run.write_json("partition.json", {"kind": "iid", "labels": ["a", "b"], "counts": {"c": [1]}})
    assert "partition.json is damaged" in render(run)[1].text


def test_everything_from_data_is_escaped(sample_run: RunFolder, tmp_path: Path) -> None:
    run = copy_of(sample_run, tmp_path)
    config = run.config() | {NASTY: NASTY, "command": NASTY, "created": NASTY}
    run.write_json("config.json", config)
    run.append_event("warning", NASTY)
    run.append_metrics(
        {"phase": NASTY, "round": 1, "scope": "global", "accuracy": 0.5, "loss": 1.0, "bytes": {NASTY: 4}}
    )
    run.append_metrics(
        {
            "phase": "federated",
            "round": 1,
            "scope": "client",
            "client": NASTY,
            "loss": 1.0,
            "bytes": {NASTY: 5},
        }
    )
    run.append_metrics({"phase": "federated", "round": 1, "scope": "client", "client": "c", "refused": NASTY})
    run.write_json("partition.json", {"kind": NASTY, "labels": [NASTY], "counts": {NASTY: [3]}})
    row = dict.fromkeys(("question", "answer", "zero_shot", "federated"), NASTY)
    run.write_json("predictions.json", [row | {"image": f"images/{NASTY}.png"}])
    summary = run.read_json("summary.json")
    for field in ("model", "dataset", "rule", "adapter"):
        summary[field] = NASTY
    summary["accuracy"][NASTY] = 0.5
    summary["phases"][NASTY] = {"accuracy": 0.5, "note": NASTY}
    summary["versions"][NASTY] = NASTY
    run.write_json("summary.json", summary)
    text, parsed = render(run)
    assert parsed.tags["script"] == 0
    assert "<script" not in text
    assert parsed.tags["img"] == 0
    assert parsed.text.count("alert(1)") >= 15


def test_pictures_from_outside_are_not_shown(sample_run: RunFolder, tmp_path: Path) -> None:
    run = copy_of(sample_run, tmp_path)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    (run.path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["../secret.png", str(tmp_path / "secret.png"), "images/link.png", "config.json", "images"]
    row = {"question": "q", "answer": "a", "zero_shot": "a", "federated": "a"}
    run.write_json("predictions.json", [row | {"image": name} for name in names])
    parsed = render(run)[1]
    assert parsed.tags["img"] == 0
    assert parsed.text.count("no image") == len(names)


def test_large_pictures_are_made_smaller(sample_run: RunFolder, tmp_path: Path) -> None:
    run = copy_of(sample_run, tmp_path)
    name = run.save_image("large", Image.effect_noise((900, 800), 90).convert("RGB"))
    run.write_json("predictions.json", [{"question": "q", "answer": "a", "image": name}])
    text, parsed = render(run)
    assert parsed.tags["img"] == 1
    assert len(text) < 700_000 < 2 * (run.path / name).stat().st_size


def test_outcomes_of_predictions(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x")
    row = {"question": "q", "answer": "Red."}
    pairs = [("blue", "red"), ("red", "red"), ("red", "blue"), ("blue", "blue"), ("blue", "RED")]
    run.write_json("predictions.json", [row | {"zero_shot": a, "federated": b} for a, b in pairs])
    text, parsed = render(run)
    words = "2 put right by tuning, 1 right before and after, 1 lost by tuning, 1 wrong before and after"
    assert words in re.sub(r"\s+", " ", parsed.text)
    assert [text.count(f'<article class="{kind}">') for kind in ("fixed", "kept", "broken", "wrong")] == [
        2,
        1,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("each", "whole", "words"),
    [
        (1000, 9673, "each round on 1,000 test questions, the last one on all 9,673"),
        (500, 500, "Exact matches on 500 test questions"),
        (500, None, "Exact matches on 500 test questions"),
        (None, None, "Share of exact matches on test questions"),
    ],
)
def test_the_curve_says_what_it_was_judged_on(
    each: int | None, whole: int | None, words: str, tmp_path: Path
) -> None:
    run = RunFolder.create(tmp_path, "x")
    row = {"phase": "federated", "round": 1, "scope": "global", "accuracy": 0.5}
    run.append_metrics(row | ({"samples": each} if each else {}))
    if whole:
        run.append_metrics(row | {"samples": whole, "final": True})
    assert words in render(run)[1].text


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run"):
        render_report(tmp_path)


def test_records_are_sorted_and_repeated_rounds_count_once() -> None:
    def client(name: str, number: int, loss: float, samples: int, **more: Any) -> dict[str, Any]:
        where = {"phase": "federated", "round": number, "scope": "client", "client": name}
        return where | {"loss": loss, "samples": samples, "bytes": {"activation_up": 10}} | more

    rows = [
        {"phase": "zero-shot", "round": 0, "scope": "global", "accuracy": 0.5},
        client("c-10", 1, 1.0, 100),
        client("c-2", 1, 3.0, 300),
        {
            "phase": "federated",
            "round": 1,
            "scope": "global",
            "bytes": {"activation_up": 20, "adapter_down": 7},
        },
        client("c-2", 2, 9.0, 300),  # the run was killed in this round and repeats it
        client("c-2", 2, 2.0, 300),
        client("c-10", 2, 1.0, 300, refused="no"),
        {"phase": "federated", "round": 2, "scope": "global", "accuracy": 0.7, "train_loss": 2.5},
        {"phase": "federated", "round": 2, "scope": "global", "accuracy": 0.8, "final": True},
        client("c-2", 2, 0.0, 40, final=True, accuracy=0.9),
    ]
    got = read_metrics(rows)
    assert got.phases == ["zero_shot", "federated"]
    assert got.main == "federated"
    assert got.accuracy == {"zero_shot": {0: 0.5}, "federated": {2: 0.8}}
    assert got.train_loss == {
        "federated": {1: 2.5, 2: 2.5}
    }  # worked out: (100 * 1 + 300 * 3) / 400; then as told
    assert got.spread["federated"][1] == (1.0, 3.0)
    # bytes of the repeated record count once; the global sum is used only for the plane that no client has
    assert got.planes["federated"] == {"adapter_down": 7, "activation_up": 50}
    assert got.refused == [("federated", 2, "c-10", "no")]
    assert [
        (c.name, c.rounds, c.refused, c.trained, c.accuracy, c.held_out, c.loss) for c in got.clients
    ] == [
        ("c-2", 2, 0, 600, 0.9, 40, 2.0),
        ("c-10", 1, 1, 100, None, None, 1.0),
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_is_wilsons(counts: tuple[int, int]) -> None:
    right, samples = counts
    expected = stats.binomtest(right, samples).proportion_ci(0.95, method="wilson")
    assert interval(right / samples, samples) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_fixture_is_a_real_run(sample_run: RunFolder) -> None:
    """The files of the fixture are those a run leaves, and can be read back."""
    assert sample_run.checkpoints()[-1] == sample_run.config()["rounds"]
    tensors, info = sample_run.load_adapter()
    assert list(tensors) == ["A"]
    assert info["adapter"] == "linear map"
    assert Summary.from_json(sample_run.read_json("summary.json")).rounds == 8
    json.loads((sample_run.path / "partition.json").read_text())
