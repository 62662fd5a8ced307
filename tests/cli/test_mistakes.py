"""Typical mistakes: each ends in a few lines that name the mistake and what to do, never in a stack trace."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fednano.cli.commands import app
from fednano.cli.failure import EXIT_HOST, EXIT_MISTAKE, EXIT_UNFIT, reported
from fednano.federation.worker import Worker

ROW = {"question": "is it red ?", "answer": "yes"}
QUICK = ["--backend", "inprocess", "--placement", "local", "--progress", "plain", "--rounds", "1", "--samples", "2",
         "--clients", "2", "--streams", "text", "--rank", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data, a finished run, and things that are not what they should be."""
    folder = tmp_path_factory.mktemp("place")
    rows = {
        "good": [ROW | {"question": f"is it red ? {n}"} for n in range(8)],
        "pictures": [ROW | {"image": "gone.png"}],
        "tell": [{"instruction": f"say {n}", "output": f"red {n}"} for n in range(20)],
    }
    for name, own in rows.items():
        (folder / name).mkdir()
        for split in ("train", "test"):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (folder / "empty").mkdir()
    (folder / "no-config").mkdir()
    (folder / "sheet.xlsx").write_bytes(b"PK")
    (folder / "broken.csv").write_text("text,text\n1,2\n")
    (folder / "broken.toml").write_text("rounds = = 3")
    (folder / "a-file").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as ended, reported():
            app(
                [
                    "simulate",
                    "--data",
                    "good",
                    *QUICK,
                    "--alpha",
                    "100",
                    "--progress",
                    "quiet",
                    "--runs-dir",
                    "done",
                ]
            )
        assert ended.value.code == 0
    yield folder
    Worker.close_current()


def simulate(*words: str) -> list[str]:
    return ["simulate", *QUICK, *words]


GOOD = ("--data", "good")
HOST = ("--placement", "split", "--host-address", "127.0.0.1:9")
DONE = ("--runs-dir", "done")
MISTAKES: dict[str, tuple[list[str], str, int]] = {
    "unknown option": (simulate("--learning-rte", "1"), "--learning-rate", 2),
    "unknown command": (["simulat"], "simulate", 2),
    "word for a number": (simulate("--rounds", "many"), "not a valid int", 2),
    "no clients": (simulate("--clients", "0"), "clients is 0; expected at least 1", 2),
    "negative alpha": (simulate("--alpha", "-1"), "alpha is -1.0; expected a positive number", 2),
    "unknown backend": (simulate("--backend", "spark"), "expected one of ray, inprocess", 2),
    "unknown display": (simulate("--progress", "loud"), "expected one of auto, live, plain, quiet", 2),
    "no such settings file": (simulate("--config", "gone.toml"), "gone.toml cannot be read", 2),
    "broken settings file": (simulate("--config", "broken.toml"), "broken.toml is not TOML", 2),
    "no such data": (simulate("--data", "./gone"), "Give a folder with train.jsonl", 2),
    "no such data set on the hub": (simulate("--data", "me/gone"), "Check the name, or give a folder", 2),
    "data of another format": (simulate("--data", "sheet.xlsx"), "expected .jsonl, .json, .csv", 2),
    "two columns of one name": (simulate("--data", "broken.csv"), "names of its columns, all different", 2),
    "folder without data": (simulate("--data", "empty"), "has no train.jsonl", 2),
    "missing image": (simulate("--data", "pictures"), "train.jsonl:1: image 'gone.png' does not exist", 2),
    "unknown data option": (simulate("--data-options", 'lable="x"'), "Did you mean 'label'", 2),
    "data option without quotes": (simulate("--data-options", "label=x"), "expected settings such as", 2),
    "unknown kind of data": (simulate("--data-kind", "poem"), "expected one of auto, vqa", 2),
    "partition without column": (simulate("--partition", "column"), "Set it to a column, such as", 2),
    "column that is not there": (
        simulate(*GOOD, "--partition", "column", "--partition-by", "ward"), "ward is missing, by which", 2),
    "free text by its answers": (simulate("--data", "tell"), "Set partition to 'iid'", 2),
    "more clients than samples": (simulate(*GOOD, "--clients", "50"), "more clients (50) than samples (8)", 2),
    "site folders that are not there": (simulate(*GOOD, "--partition", "folders"), "Make one for each client", 2),
    "unknown metric": (simulate("--metric", "bleu"), "expected one of auto, exact-match", 2),
    "no such model": (simulate(*GOOD, "--model", "me/gone"), "no model 'me/gone'", 2),
    "folder that is no model": (simulate(*GOOD, "--model", "no-config"), "has no config.json", 2),
    "file for a model": (simulate(*GOOD, "--model", "a-file"), "is a file; expected a model folder", 2),
    "unknown adapter": (simulate(*GOOD, "--adapter", "lorra"), "Did you mean 'lora'?", 2),
    "unknown adapter option": (simulate(*GOOD, "--adapter-options", "alhpa=8"), "alhpa", 2),
    "unknown rule": (simulate(*GOOD, "--rule", "fedavgg"), "Did you mean 'fedavg'?", 2),
    "unknown rule option": (simulate(*GOOD, "--rule-options", "flor=1"), "flor", 2),
    "unknown codec": (simulate("--codec", "zip"), "codec is 'zip'; expected one of fp32", 2),
    "settings that exclude each other": (
        simulate("--exchange", "factored", "--wire-dtype", "float16"), "set wire-dtype to bfloat16 or int8", 2),
    "no GPU": (simulate(*GOOD, "--device", "cuda"), "Set device to 'cpu'", 2),
    "no such run to resume": (simulate("--resume", "gone"), "Give an id, 'latest', or a path", 2),
    "runs folder that is a file": (simulate(*GOOD, "--runs-dir", "a-file"), "a-file", 2),
    "no such token file": (
        simulate(*GOOD, *HOST, "--host-token-file", "gone"), "gone", 2),
    "host that nobody runs": (simulate(*GOOD, *HOST, "--host-retry", "0.2"), "127.0.0.1:9", EXIT_HOST),
    "question to no run": (["generate", "gone", "what is it ?"], "There is no run 'gone'", 2),
    "picture that is not there": (
        ["generate", "latest", "what is it ?", "--image", "gone.png", *DONE], "gone.png", 2),
    "unknown export format": (["export", "latest", "--format", "onnx", *DONE], "peft", 2),
    "report of no run": (["report", "gone", *DONE], "The newest there:", 2),
    "comparison of one run": (["compare", "latest", *DONE], "two runs or more", 2),
    "app with a bad name": (["init", "My App"], "such as ward-study", 2),
    "doctor without a GPU": (["doctor", *GOOD, "--device", "cuda"], "Set it to 'cpu'", EXIT_UNFIT),
    "request without a key": (
        ["unlearn", "submit", "--site", "client-000", "--client", "--reason", "x", *DONE], "keygen", 2),
    "receipt that is not there": (["unlearn", "verify-receipt", "gone.json", "--key", "0" * 64], "gone.json", 2),
    "log that is not there": (["evaluate", "tofu", "--log", "gone.json"], "gone.json", 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_remedy(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words, says, code = MISTAKES[name]
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as ended, reported():
        app(words)
    found = capfd.readouterr()
    said = f"{found.out}\n{found.err}"
    assert ended.value.code == code, said
    assert says in said.replace("\n", " ") or says in said, said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if "error" in line.lower()]
    assert len(said.splitlines()) < 25, said
    assert errors or code == EXIT_UNFIT


@pytest.mark.parametrize(
    "words", [("--rule", "fedavgg"), ("--adapter", "lorra"), ("--adapter-options", "alhpa=8")]
)
def test_a_misspelt_name_is_told_before_anything_starts(words: tuple[str, str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as ended, reported():
        app(["simulate", "--runs-dir", str(runs), *words])  # with Ray, which would take ten seconds
    assert ended.value.code == EXIT_MISTAKE
    assert not runs.exists()


def test_a_taken_port_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SystemExit) as ended, reported():
            app(["host", "--model", "tiny", "--listen", address])
    assert ended.value.code == EXIT_MISTAKE
    said = capfd.readouterr().err
    assert address in said
    assert "Traceback" not in said
