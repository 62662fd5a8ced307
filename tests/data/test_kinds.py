"""Every layout that a user may bring, read without code: what becomes of a row, and that none vanishes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import f1_score

from fednano.data import load_dataset, reading
from fednano.data.store import MappedSamples
from fednano.data.tagging import entities
from fednano.errors import DataError
from fednano.evaluation import METRICS, score_by
from fednano.evaluation.metrics import choice, entity_f1, macro_f1


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDNANO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def picture(path: Path, colour: str = "red") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path.read_bytes()


def lines(file: Path, *rows: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_alpaca(tmp_path: Path) -> None:
    file = tmp_path / "alpaca.json"
    rows = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        {"instruction": "Silence.", "output": " "},
    ]
    file.write_text(json.dumps(rows))
    data = load_dataset(file, whole=True)
    assert [(s.question, s.answer) for s in data] == [("Add.\n\n1 + 1", "2"), ("Greet.", "Hello")]
    assert data.kind == "instruction"
    assert str(data.bad_rows[0]) == f"{file}:3: output must be a non-empty string, got ' '"


@pytest.mark.parametrize("style", ["openai", "sharegpt"])
def test_every_reply_of_a_conversation_is_learnt_once_after_its_history(style: str, tmp_path: Path) -> None:
    said = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Yo"),
        ("user", "Bye"),
        ("assistant", "Ciao"),
    ]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    row = (
        {"messages": [{"role": role, "content": text} for role, text in said]}
        if style == "openai"
        else {"conversations": [{"from": names[role], "value": text} for role, text in said]}
    )
    data = load_dataset(lines(tmp_path / "d" / "train.jsonl", row).parent)
    assert [(s.question, s.answer) for s in data] == [("Hi", "Yo"), ("Bye", "Ciao")]
    assert data[0].history == (("system", "Be brief."),)
    assert data[1].history == tuple(said[:3])
    assert len({s.id for s in data}) == 2


@pytest.mark.parametrize(
    "turns",
    [[], "Hi", [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Hi"}],
     [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
     [{"role": "user"}, {"role": "assistant", "content": "b"}]],
)  # fmt: skip
def test_conversations_that_teach_nothing_are_reported(turns: Any, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    data = load_dataset(lines(tmp_path / "d" / "train.jsonl", good, {"messages": turns}).parent)
    assert (len(data), [row.line for row in data.bad_rows]) == (1, [2])


def test_llava_instruction_data_keeps_its_image(tmp_path: Path) -> None:
    picture(tmp_path / "d" / "images" / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    data = load_dataset(
        lines(tmp_path / "d" / "train.jsonl", {"image": "a.png", "conversations": turns}).parent
    )
    assert data[0].question == "What is it?"
    assert data[0].load_image() is not None


TEXTS = [("good film", "pos"), ("dull, long", "neg"), ('a "gem"\nof two lines', "pos")]


def table(kind: str, folder: Path) -> Path:
    file = folder / f"reviews.{kind}"
    rows = [{"text": text, "label": label} for text, label in TEXTS]
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
    elif kind == "jsonl":
        lines(file, *rows)
    else:
        out = io.StringIO()
        writer = csv.DictWriter(out, ["text", "label"], delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        file.write_text(out.getvalue())
    return file


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_text_classification_from_any_table(kind: str, tmp_path: Path) -> None:
    data = load_dataset(
        table(kind, tmp_path), whole=True, options={"prompt": "{labels}? {text}", "labels": "neg,pos"}
    )
    assert data.kind == "text-classification"
    assert [(s.question, s.answer) for s in data] == [(f"neg, pos? {text}", label) for text, label in TEXTS]


def test_classes_by_number_get_their_names(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("sentence,stars\nfine,1\nbad,0\nodd,2\nshort\n")
    options = {"label": "stars", "labels": "neg,pos"}
    data = load_dataset(file, options=options, whole=True)
    assert data.labels == ("pos", "neg")
    assert [(row.line, row.reason[:14]) for row in data.bad_rows] == [
        (4, "stars is 2; th"),
        (5, "has 1 cells, t"),
    ]


def test_token_classification(tmp_path: Path) -> None:
    words = ["Ada", "Lovelace", "met", "Babbage", "in", "London"]
    tags = ["B-PER", "I-PER", "O", "B-PER", "O", "B-LOC"]
    rows = [{"tokens": words, "ner_tags": tags}, {"tokens": ["no", "one"], "ner_tags": ["O", "O"]}]
    bad = {"tokens": ["a"], "ner_tags": ["O", "O"]}
    data = load_dataset(lines(tmp_path / "d" / "train.jsonl", *rows, bad).parent)
    assert data.kind == "token-classification"
    assert data.labels == ("PER: Ada Lovelace; PER: Babbage; LOC: London", "none")
    assert data[0].question.endswith(" ".join(words))
    assert "expected as many" in data.bad_rows[0].reason


def test_entities_of_other_schemes() -> None:
    assert entities(["a", "dog"], ["DET", "NOUN"]) == [("DET", "a"), ("NOUN", "dog")]
    # an inside without its begin starts a part of its own, and two parts may follow each other
    assert entities(["x", "y", "z"], ["I-A", "B-A", "I-B"]) == [("A", "x"), ("A", "y"), ("B", "z")]


def test_image_folders_with_and_without_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number, label in enumerate(["cat", "dog"]):
            picture(tmp_path / "split" / split / label / f"{number}.png")
    (tmp_path / "split" / "train" / "dog" / "notes.txt").write_text("x")
    data = load_dataset(tmp_path / "split")
    assert (data.labels, data.kind) == (("cat", "dog"), "image-classification")
    assert "Choose one of: cat, dog." in data[0].question
    assert [str(row.file.name) for row in data.bad_rows] == ["notes.txt"]
    assert load_dataset(tmp_path / "split", "test").labels == ("cat", "dog")
    for number in range(20):
        picture(tmp_path / "flat" / "only" / f"{number:02}.png")
    train, test = (load_dataset(tmp_path / "flat", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (18, 2)


def test_without_a_test_split_every_tenth_sample_is_kept_for_it(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", *({"question": f"q{n}", "answer": "x"} for n in range(25)))
    train, test, whole = load_dataset(file), load_dataset(file, "test"), load_dataset(file, whole=True)
    assert [s.question for s in test] == ["q9", "q19"]
    assert sorted(s.id for s in [*train, *test]) == sorted(s.id for s in whole)
    lines(tmp_path / "b.jsonl", {"question": "q", "answer": "y"})
    assert load_dataset(file, "test", options={"test": "b.jsonl"}).labels == ("y",)
    assert len(load_dataset(file, options={"test": "b.jsonl"})) == 25


SCIENCE = {
    "question": "Which is a gas?",
    "choices": ["rock", "air"],
    "answer": 1,
    "hint": "Look up.",
    "lecture": "long",
}


def science(folder: Path) -> Path:
    picture(folder / "train" / "1" / "image.png")
    cases = {
        "1": ("image.png", "train"),
        "2": (None, "train"),
        "3": ("image.png", "train"),
        "4": (None, "test"),
    }
    problems = {n: SCIENCE | {"image": image, "split": split} for n, (image, split) in cases.items()}
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["1", "2", "3", "9"], "test": ["4"]}))
    return folder


def test_science_qa_as_its_makers_publish_it(tmp_path: Path) -> None:
    data = load_dataset(science(tmp_path / "scienceqa"))
    assert data.kind == "multiple-choice"
    assert [s.id for s in data] == ["scienceqa/1", "scienceqa/2"]
    assert (
        data[0].question == "Context: Look up.\nWhich is a gas?\n(A) rock\n(B) air\nAnswer with the letter."
    )
    assert (data[0].answer, data[0].image is not None, data[1].image) == ("B", True, None)
    assert [row.line for row in data.bad_rows] == [3, 4]
    assert "3: train/3/image.png does not exist" in data.bad_rows[0].reason
    assert len(load_dataset(tmp_path / "scienceqa", "test")) == 1
    with pytest.raises(DataError, match="no split 'minitrain'; it has train, test"):
        load_dataset(tmp_path / "scienceqa", options={"train": "minitrain"})


def test_science_qa_as_the_hub_has_it(tmp_path: Path) -> None:
    import datasets

    image = {"bytes": picture(tmp_path / "a.png"), "path": None}
    rows = [
        SCIENCE | {"image": image, "task": "closed choice"},
        SCIENCE | {"image": None, "task": "closed choice"},
    ]
    features = datasets.Features({
        "question": datasets.Value("string"), "choices": datasets.Sequence(datasets.Value("string")),
        "answer": datasets.Value("int8"), "hint": datasets.Value("string"), "lecture": datasets.Value("string"),
        "image": datasets.Image(), "task": datasets.Value("string"),
    })  # fmt: skip
    made = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(tmp_path / "saved")
    data = load_dataset(tmp_path / "saved")
    assert (data.kind, data.labels) == ("multiple-choice", ("B", "B"))
    assert data[0].load_image() is not None
    assert data[1].image is None
    assert load_dataset(tmp_path / "saved", "test").labels == ("B", "B")
    (tmp_path / "shards" / "data").mkdir(parents=True)
    for number in range(2):
        made.to_parquet(tmp_path / "shards" / "data" / f"train-0000{number}-of-00002.parquet")
    again = load_dataset(tmp_path / "shards")
    assert len({s.id for s in again}) == 4
    assert again[2].image == data[0].image  # kept once, by content


def test_icon_qa_as_its_makers_publish_it(tmp_path: Path) -> None:
    found = {
        "1": {"question": "How many?", "choices": ["3", "4"], "answer": 1, "ques_type": "choose_txt"},
        "2": {"question": "Fill in.", "answer": "7", "ques_type": "fill_in_blank"},
        "3": {"question": "Which?", "choices": ["choice_0.png"], "answer": 0, "ques_type": "choose_img"},
    }
    base = tmp_path / "iconqa_data"
    for number, task in (("1", "choose_txt"), ("2", "fill_in_blank"), ("3", "choose_img")):
        picture(base / "iconqa" / "train" / task / number / "image.png")
    (base / "problems.json").write_text(json.dumps({k: v | {"split": "train"} for k, v in found.items()}))
    (base / "pid_splits.json").write_text(json.dumps({"train": ["1", "2", "3"], "choose_txt_train": ["1"]}))
    data = load_dataset(tmp_path)
    assert [(s.answer, s.image is not None) for s in data] == [("B", True), ("7", True)]
    assert "its choices are pictures" in data.bad_rows[0].reason
    assert len(load_dataset(tmp_path, options={"train": "choose_txt_train"})) == 1


cell = st.one_of(
    st.none(), st.integers(), st.text(max_size=5), st.lists(st.text(max_size=3), max_size=3), st.booleans()
)
names = [
    "question",
    "answer",
    "answers",
    "text",
    "label",
    "tokens",
    "tags",
    "instruction",
    "output",
    "messages",
    "choices",
]


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.dictionaries(st.sampled_from(names), cell, max_size=5), min_size=1, max_size=6))
def test_whatever_the_rows_hold_each_is_used_or_reported(
    rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = lines(tmp_path_factory.mktemp("d") / "train.jsonl", *rows).parent
    try:
        data = load_dataset(folder)
    except DataError:
        return
    used = {sample.id.partition("#")[0] for sample in data}
    assert len(used) + len(data.bad_rows) == len(rows)


@pytest.mark.parametrize("how", ["option", "size"])
def test_data_larger_than_memory_is_mapped_and_reads_the_same(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "d" / "images" / "a.png")
    rows = [
        {"question": f"q{n}", "answers": ["x", "x", "y"], "image": "a.png" if n % 2 else None}
        for n in range(2500)
    ]
    chat = {"question": 3, "answer": "x"}
    folder = lines(tmp_path / "d" / "train.jsonl", *rows, chat).parent
    plain = load_dataset(folder)
    options = {"map": True} if how == "option" else {}
    if how == "size":
        monkeypatch.setattr(reading, "MAP_BYTES", 1000)
    for _ in range(2):  # made, and found again
        mapped = load_dataset(folder, options=options)
        assert isinstance(mapped.samples, MappedSamples)
        assert list(mapped) == list(plain)
        assert mapped.bad_rows == plain.bad_rows
        assert mapped.kind == plain.kind
        assert mapped.fingerprint(images=False) == plain.fingerprint(images=False)
    part = mapped.subset(range(2400, 2500)).rows([5, 99, 0])
    assert [s.question for s in part] == ["q2405", "q2499", "q2400"]
    assert mapped[-1] == plain[-1]
    with pytest.raises(IndexError):
        mapped[2500]
    lines(tmp_path / "d" / "train.jsonl", *rows[:3])  # a changed source is read anew
    assert len(load_dataset(folder, options={"map": True})) == 3
    for kept in (tmp_path / "cache" / "data").glob("*.arrow"):
        kept.write_bytes(b"damaged")
    assert len(load_dataset(folder, options={"map": True})) == 3


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"colour": "red"}], {}, r"columns colour, which fit no kind .* --data-kind"),
        (
            [{"text": "a", "label": "b"}],
            {"options": {"lable": "x"}},
            "unknown data option 'lable'. Did you mean 'label'",
        ),
        ([{"text": "a", "label": "b"}], {"options": {"label": 3}}, "data option label is 3; expected str"),
        ([{"text": "a", "label": "b"}], {"kind": "poetry"}, "data-kind is 'poetry'; expected auto or one of"),
        (
            [{"text": "a", "label": "b"}],
            {"options": {"test": "b.csv"}, "split": "test"},
            r"b\.csv does not exist",
        ),
        ([{"text": "a", "label": "b"}], {"options": {"group": "site"}}, "site is missing, by which"),
    ],
)
def test_mistakes_name_the_remedy(
    rows: list[Any], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(lines(tmp_path / "a.jsonl", *rows), **arguments)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.xlsx", b"", "ends in '.xlsx'; expected .jsonl"),
        ("a.parquet", b"no", "is not Parquet"),
        ("a.json", b"{", "is not JSON"),
        ("b.json", b"{}", "holds dict; expected a list"),
        ("a.csv", b"x,x\n1,2\n", "names of its columns, all different"),
        ("c.csv", b"text,label\n\xff,1\n", "not UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_dataset(tmp_path / name)


def test_by_column(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "x", "ward": f"w{n % 3}"} for n in range(12)]
    data = load_dataset(lines(tmp_path / "a.jsonl", *rows), options={"group": "ward"}, whole=True)
    assert data.groups == ("w0", "w1", "w2") * 4


@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(*[st.sampled_from(["cat", "dog", "an owl"])] * 2), min_size=1, max_size=30))
def test_macro_f1_agrees_with_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    said, right = [a for a, _ in pairs], [b for _, b in pairs]
    expected = f1_score(right, said, labels=sorted(set(right)), average="macro", zero_division=0)
    assert macro_f1(said, right) == pytest.approx(expected)


def test_metrics_by_hand() -> None:
    assert entity_f1(["PER: Ada; LOC: Rome", "none"], ["PER: Ada; LOC: Paris", "none"]) == pytest.approx(0.5)
    assert entity_f1(["none"], ["none"]) == 1.0
    assert [choice(said, "B") for said in ("B", "(b) blue", "The answer is B.", "A", "", "blue")] == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]
    for name in METRICS:
        assert score_by(name, ["B"], [("B", "B")]) == 1.0 or name == "entity-f1"
    with pytest.raises(DataError, match="unknown metric 'bleu'"):
        score_by("bleu", ["a"], [("a",)])
    with pytest.raises(DataError, match="at least one; got 0 and 0"):
        score_by("vqa", [], [])
