"""The tiny model: the script that makes it, and the files that come with the package."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "fednano" / "models" / "tiny"
SCRIPT = ROOT / "simulations" / "pretrain_tiny.py"
# The script finds its own package beside it; so do its tests. The folder holds no name that others use.
sys.path.insert(0, str(SCRIPT.parent))

from pretrain_tiny import FULL, SMOKE, _machine, _versions, make, pretrain, weights_hash  # noqa: E402
from pretraining.evaluate import easy_vqa_questions, zero_shot  # noqa: E402
from pretraining.lean import lean  # noqa: E402
from pretraining.network import build_model, save  # noqa: E402
from pretraining.questions import Item, ask, caption, checklist, fact  # noqa: E402
from pretraining.scenes import MAX_OBJECTS, draw_scenes  # noqa: E402
from pretraining.stages import answer_loss, pack  # noqa: E402
from pretraining.vocabulary import COLOURS, SHAPES, WORDS, build_processor, build_tokenizer  # noqa: E402


def _quiet(_: str) -> None:
    pass


def _record() -> dict[str, Any]:
    record: dict[str, Any] = json.loads((TINY / "pretraining.json").read_text())
    return record


@pytest.fixture(scope="module")
def tiny() -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(TINY).eval()


# --- the script ---


def test_same_seed_same_file_other_seed_other_file(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        save(pretrain(SMOKE, seed, _quiet), tmp_path / name)
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b")
    assert weights_hash(tmp_path / "a") != weights_hash(tmp_path / "c")


def test_training_leaves_global_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    pretrain(dataclasses.replace(SMOKE, questions=1), 0, _quiet)
    assert torch.equal(torch.rand(2), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_script_runs_alone_and_verifies_its_hash(tmp_path: Path) -> None:
    out = tmp_path / "model"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", str(SCRIPT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    made = run("--out", str(out), "--smoke")
    assert made.returncode == 0, made.stderr
    record = json.loads((out / "pretraining.json").read_text())
    assert record["weights_sha256"] in made.stdout
    assert record["recipe"]["encoder"]["steps"] == SMOKE.encoder.steps
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    spoiled = run("--verify", str(out))
    assert (spoiled.returncode, "DIFFERENT" in spoiled.stdout) == (1, True)


def test_both_goals_at_once_or_none_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain_tiny import main

    for wrong in (
        [],
        ["--out", "x", "--verify", "y"],
        ["--verify", "/nowhere"],
        ["--out", "x", "--seed", "-1"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
    assert "--seed: got -1, expected 0 or more" in capsys.readouterr().err


# --- pictures and questions ---


def test_scenes_are_what_they_say() -> None:
    scenes = draw_scenes(np.random.default_rng(0), 200)
    again = draw_scenes(np.random.default_rng(0), 200)
    assert np.array_equal(scenes.pixels, again.pixels)
    assert (scenes.pixels.shape, scenes.pixels.dtype) == ((200, 3, 64, 64), np.dtype(np.uint8))
    assert set(scenes.count) == set(range(1, MAX_OBJECTS + 1))
    for row in range(200):
        n = scenes.count[row]
        assert len(set(scenes.shape[row, :n])) == n == len(set(scenes.colour[row, :n]))
        assert set(scenes.owner[row]) - {-1} == set(range(n)), "every object covers some patch, no other does"


def test_grounds_as_light_as_those_of_easy_vqa_are_rare() -> None:
    pictures, _, _ = easy_vqa_questions("test", 50)
    theirs = np.stack([np.asarray(picture)[0, 0] for picture in pictures]).min(1)
    ours = draw_scenes(np.random.default_rng(1), 1000).pixels[:, :, 0, 0].min(1)
    assert np.median(theirs) > 225
    assert (ours >= theirs.min()).mean() < 0.03


_NEGATIONS = {"not", "no", "absent", "missing", "without", "free"}


def _is_true(item: Item, things: list[tuple[str, str]]) -> bool:
    """Judge a yes/no question by its words alone."""
    words = set(item.question.replace("?", "").split())
    colours, shapes = words & set(COLOURS), words & set(SHAPES)
    there = any((not colours or c in colours) and (not shapes or s in shapes) for c, s in things)
    return there != bool(words & _NEGATIONS)


def test_absence_is_seldom_said_as_in_easy_vqa() -> None:
    rng = np.random.default_rng(9)
    scenes = draw_scenes(rng, 200)
    items = [ask(rng, scenes, row) for row in range(200) for _ in range(20)]
    binary = [set(item.question.split()) for item in items if item.answer in ("yes", "no")]
    absent = [words for words in binary if words & _NEGATIONS]
    assert len(absent) > 0.4 * len(binary)
    assert 0.02 < sum(bool(words & {"not", "no"}) for words in absent) / len(absent) < 0.06


def test_answers_are_true() -> None:
    rng = np.random.default_rng(2)
    scenes = draw_scenes(rng, 400)
    seen: set[str] = set()
    for row in range(400):
        n = int(scenes.count[row])
        things = [(COLOURS[scenes.colour[row, i]], SHAPES[scenes.shape[row, i]]) for i in range(n)]
        for _ in range(5):
            item = ask(rng, scenes, row)
            words = item.question.split()
            if item.answer in ("yes", "no"):
                assert (item.answer == "yes") == _is_true(item, things), (item, things)
            elif item.answer in COLOURS:
                named = [s for s in SHAPES if s in words]
                assert (item.answer, named[0] if named else things[0][1]) in things
            elif item.answer in SHAPES:
                named = [c for c in COLOURS if c in words]
                assert (named[0] if named else things[0][0], item.answer) in things
            elif item.answer in ("one", "two", "three"):
                assert ("one", "two", "three").index(item.answer) == n - 1
            else:
                slot = next(i for i, (_, s) in enumerate(things) if s in words)
                at = scenes.x[row, slot] if item.answer in ("left", "right") else scenes.y[row, slot]
                assert (item.answer in ("right", "bottom")) == (at > 32)
            seen.add(item.answer)
    assert seen >= {"yes", "no", "one", "two", "three", "left", "right", "top", "bottom", *COLOURS, *SHAPES}


def test_facts_are_answered_by_their_text() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        item = fact(rng)
        *told, question = item.question.split(" . ")
        triples = [re.fullmatch(r"the (\w+) of (\w+) is (\w+)", sentence) for sentence in told]
        words = set(question.split())
        answers = {m[3] for m in triples if m is not None and m[1] in words and m[2] in words}
        assert None not in triples
        assert answers == {item.answer}
        assert not item.needs_image


def test_checklists_are_true() -> None:
    rng = np.random.default_rng(8)
    scenes = draw_scenes(rng, 100)
    for row in range(100):
        n = int(scenes.count[row])
        things = [(COLOURS[scenes.colour[row, i]], SHAPES[scenes.shape[row, i]]) for i in range(n)]
        answer = checklist(rng, scenes, row).answer
        entries = re.findall(r"(.+?) (yes|no)(?: |$)", answer)
        assert len(entries) == 8
        for thing, told in entries:
            assert (told == "yes") == _is_true(Item(thing, told), things)


def _normal(sentence: str) -> str:
    return " ".join(re.findall(r"\w+|[^\w\s]", sentence.lower()))


def test_no_sentence_of_easy_vqa_is_ever_asked() -> None:
    theirs = {_normal(text) for split in ("train", "test") for text in _questions(split)[0]}
    rng = np.random.default_rng(4)
    scenes = draw_scenes(rng, 200)
    ours = set()
    for row in range(200):
        ours |= {_normal(ask(rng, scenes, row).question) for _ in range(60)}
        ours |= {_normal(item(rng, scenes, row).question) for item in (caption, checklist)}
        ours.add(_normal(fact(rng).question))
    assert len(theirs) > 100
    assert len(ours) > 1000
    assert not theirs & ours


def _questions(split: str) -> tuple[list[str], list[str]]:
    import easy_vqa

    texts, answers, _ = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]()
    return texts, answers


# --- words ---


def test_every_word_of_easy_vqa_is_known() -> None:
    tokenizer = build_tokenizer()
    unknown = tokenizer.unk_token_id
    for split in ("train", "test"):
        texts, answers = _questions(split)
        assert all(unknown not in ids for ids in tokenizer(sorted(set(texts)))["input_ids"])
        assert all(len(ids) == 1 for ids in tokenizer(sorted(set(answers)))["input_ids"])


def test_every_word_is_used_in_pretraining() -> None:
    rng = np.random.default_rng(5)
    scenes = draw_scenes(rng, 1500)
    used = {"question", "answer", ":"}
    for row in range(600):
        for item in [
            *(ask(rng, scenes, row) for _ in range(5)),
            caption(rng, scenes, row),
            fact(rng),
            checklist(rng, scenes, row),
        ]:
            used |= set(item.question.split()) | set(item.answer.split())
    assert used == {word for word in WORDS if not word.startswith("<")}


def test_prompt_of_the_chat_template_is_what_training_saw() -> None:
    processor = build_processor()
    turn = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "Is a red star visible?"}],
    }
    item = Item("is a red star visible ?", "yes")
    ids = pack([[item]], 16)[0][0].tolist()
    text = processor.apply_chat_template([turn, {"role": "assistant", "content": "yes"}])
    from PIL import Image

    assert processor(text=[text], images=[Image.new("RGB", (64, 64))])["input_ids"][0] == ids
    assert text.startswith("<bos><image> question : ")
    assert text.endswith(" answer : yes <eos>")
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert processor.tokenizer(prompt)["input_ids"] == [*ids[:2], *ids[17:-2]]


# --- training ---


def _batch() -> tuple[Any, list[list[Item]]]:
    rng = np.random.default_rng(6)
    scenes = draw_scenes(rng, 3)
    rows = [
        [ask(rng, scenes, row), checklist(rng, scenes, row), fact(rng), caption(rng, scenes, row)][: 4 - row]
        for row in range(3)
    ]
    return scenes, rows


def test_packed_items_do_not_see_each_other() -> None:
    """The loss of a packed row is that of its items asked one by one through Hugging Face's own forward pass."""
    model = build_model(0).eval()
    model.set_attn_implementation("eager")
    scenes, rows = _batch()
    pixels = torch.from_numpy(scenes.pixels) / 127.5 - 1.0
    images = torch.stack(list(model.get_image_features(pixels).pooler_output))
    losses, tokens = [], []
    for row, items in enumerate(rows):
        for item in items:
            ids, labels, *_ = pack([[item]], 16)
            start = 0 if item.needs_image else 17
            text = torch.from_numpy(np.concatenate([ids[:, : 1 if start else 0], ids[:, start:]], axis=1))
            wanted = torch.from_numpy(
                np.concatenate([labels[:, : 1 if start else 0], labels[:, start:]], axis=1)
            )
            given = {"pixel_values": pixels[row : row + 1]} if item.needs_image else {}
            logits = model(input_ids=text, **given).logits
            asked = wanted >= 0
            losses.append(torch.nn.functional.cross_entropy(logits[asked], wanted[asked], reduction="sum"))
            tokens.append(int(asked.sum()))
    expected = torch.stack(losses).sum() / sum(tokens)
    got, _ = answer_loss(model, images, pack(rows, 16))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0.0)


def test_lean_layers_have_the_gradients_of_the_plain_ones() -> None:
    model = build_model(1)
    model.set_attn_implementation("eager")
    scenes, rows = _batch()
    pixels = torch.from_numpy(scenes.pixels) / 127.5 - 1.0

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        answer_loss(model, model.model.multi_modal_projector(features), pack(rows, 16))[0].backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    layers = [type(module) for module in model.modules()]
    with lean(model):
        fast = gradients()
    assert [type(module) for module in model.modules()] == layers
    assert plain.keys() == fast.keys()
    scale = max(float(gradient.norm()) for gradient in plain.values())
    for name, gradient in plain.items():
        assert float((gradient - fast[name]).norm()) < 1e-5 * scale, name


# --- the files in the package ---


def test_committed_weights_have_the_recorded_hash_and_recipe() -> None:
    record = _record()
    assert weights_hash(TINY) == record["weights_sha256"]
    assert record["recipe"] == json.loads(json.dumps(dataclasses.asdict(FULL)))
    assert record["seed"] == 0


def test_folder_is_small_and_of_the_promised_size(tiny: Any) -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 12e6
    parameters = sum(parameter.numel() for parameter in tiny.parameters())
    assert 2e6 <= parameters <= 5e6
    assert parameters == _record()["parameters"]


def test_folder_loads_with_hugging_face_classes(tiny: Any) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

    _, info = LlavaForConditionalGeneration.from_pretrained(TINY, output_loading_info=True)
    assert not any(info.values()), info
    assert all(parameter.dtype == torch.float32 for parameter in tiny.parameters())
    processor = AutoProcessor.from_pretrained(TINY)
    assert type(processor).__name__ == "LlavaProcessor"
    assert AutoTokenizer.from_pretrained(TINY).get_vocab() == build_tokenizer().get_vocab()
    pixels = AutoImageProcessor.from_pretrained(TINY)(
        Image.new("RGB", (90, 70), "white"), return_tensors="pt"
    )
    assert pixels["pixel_values"].shape == (1, 3, 64, 64)
    assert float(pixels["pixel_values"].min()) == pytest.approx(1.0)


def test_committed_files_are_those_the_script_writes(tmp_path: Path) -> None:
    save(build_model(0), tmp_path)
    for path in tmp_path.iterdir():
        if path.name != "model.safetensors":
            assert (TINY / path.name).read_text() == path.read_text(), path.name


def test_streams_that_adapters_sit_on_are_near_unit_scale(tiny: Any) -> None:
    pictures = draw_scenes(np.random.default_rng(7), 32).pixels
    with torch.no_grad():
        images = torch.stack(
            list(tiny.get_image_features(torch.from_numpy(pictures) / 127.5 - 1.0).pooler_output)
        )
    words = tiny.get_input_embeddings().weight[5:]
    assert 0.5 < float(images.square().mean().sqrt()) < 2.0
    assert 0.5 < float(words.detach().square().mean().sqrt()) < 2.0


def test_zero_shot_accuracy_is_the_recorded_one(tiny: Any) -> None:
    recorded = _record()["measured"]["easy_vqa_test_zero_shot"]
    assert recorded["questions"] == len(easy_vqa_questions("test")[1]) == 9673
    score = zero_shot(tiny, 300)
    # Three standard errors of 300 answers.
    assert abs(score.accuracy - recorded["accuracy"]) < 3 * (0.25 / 300) ** 0.5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_run_reproduces_the_committed_weights(tmp_path: Path) -> None:
    record = _record()
    if (_versions(), _machine()) != (record["versions"], record["machine"]):
        pytest.skip("bits are promised on the recorded versions and kind of machine only")
    assert make(tmp_path, FULL, 0, _quiet)["weights_sha256"] == record["weights_sha256"]
