"""Multimodal families: edge and language part together are the undivided model, here and through a host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal_folders import KINDS, save
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, Gemma3Processor, Idefics3Processor

from fednano.adapters import create
from fednano.errors import HostRefused, ModelError
from fednano.host import RemoteLLM, RunningHost, serve
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.files import find_model
from fednano.models.images import ImageSpan, ImageUse
from fednano.models.language import LanguageModel, LocalLLM
from fednano.models.load import (
    count_parameters,
    load_edge,
    load_head,
    load_image_processor,
    load_language,
    split_model,
)
from fednano.models.multimodal import multimodal_class, sides_of
from fednano.models.vision import ImageSizes, token_count

SIZES = [(40, 20), (16, 16), (24, 40)]
ASKED = [("what is this?", "red circle"), ("is there a dog?", "no"), ("where is the cat?", "left of the tea")]


@dataclass(frozen=True)
class Family:
    kind: str
    folder: Path
    whole: Any
    edge: EdgePart
    llm: LocalLLM
    host: RunningHost
    remote: RemoteLLM


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    folder = tmp_path_factory.mktemp(request.param)
    whole = save(request.param, folder)
    edge, llm = load_edge(str(folder)), LocalLLM(load_language(str(folder)))
    with (
        serve(llm, threads=1, grace=1.0, batch_tokens=2048) as host,
        RemoteLLM(host.address, insecure=True) as remote,
    ):
        yield Family(request.param, folder, whole, edge, llm, host, remote)


def pictures() -> list[Image.Image]:
    torch.manual_seed(3)
    made = []
    for width, height in SIZES:
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
        made.append(Image.fromarray(pixels.numpy()))
    return made


def whole_inputs(family: Family, image: Image.Image, question: str, answer: str | None) -> dict[str, Tensor]:
    """What the undivided model is given, by the family's own processor where that can be made without torchvision."""
    tokenizer = family.edge.tokenizer
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if answer is not None:
        text += f" {answer}"
    images = load_image_processor(find_model(str(family.folder)))
    if family.kind in ("qwen2_vl", "qwen2_5_vl"):
        found = dict(images(images=[image], return_tensors="pt"))
        tokens = int(found["image_grid_thw"].prod()) // 4
        text = text.replace("<|image_pad|>", "<|image_pad|>" * tokens)
        found["input_ids"] = tokenizer(text, return_tensors="pt")["input_ids"]
        found["mm_token_type_ids"] = (found["input_ids"] == family.edge.image_token_id).int()
    elif family.kind == "gemma3":
        for name, token in (
            ("boi", "<start_of_image>"),
            ("eoi", "<end_of_image>"),
            ("image", "<image_soft_token>"),
        ):
            setattr(tokenizer, f"{name}_token", token)
            setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        processor = Gemma3Processor(images, tokenizer, image_seq_length=4)
        found = dict(processor(images=[image], text=text, return_tensors="pt"))
    else:
        processor = Idefics3Processor(images, tokenizer, image_seq_len=4)
        found = dict(processor(images=[image], text=text, return_tensors="pt"))
    found = {name: value for name, value in found.items() if name in TAKEN}
    if answer is not None:
        end = torch.tensor([[tokenizer.eos_token_id]])
        found["input_ids"] = torch.cat([found["input_ids"], end], 1)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in found:
                found[name] = torch.cat([found[name], torch.zeros_like(end)], 1)
    return found


TAKEN = {
    "input_ids",
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
}


def batch_of(family: Family, nano: NanoEdge, *, answers: bool = True) -> Any:
    prompts = [nano.edge.prompt(question, answer if answers else None) for question, answer in ASKED]
    return nano(prompts, nano.edge.encode(nano.edge.preprocess(pictures())))


def nano_of(edge: EdgePart, act: str = "gelu") -> NanoEdge:
    nano = NanoEdge(edge, {s: create("nano", rank=3, act=act) for s in ("image", "text")}, seed=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for leaf in nano.layers.parameters():
            leaf.add_(0.1 * torch.randn(leaf.shape, generator=draw))
    return nano


def test_the_sides_are_found_and_none_holds_the_other(family: Family) -> None:
    counted = count_parameters(str(family.folder))
    assert sum(p.numel() for p in family.edge.parameters()) == counted["edge"] < counted["model"]
    assert counted["model"] == sum(p.numel() for p in family.whole.parameters())
    use = {"gemma3": ImageUse.BLOCK, "idefics3": ImageUse.PLAIN, "smolvlm": ImageUse.PLAIN}
    assert family.llm.part.image_use == use.get(family.kind, ImageUse.GRID)
    assert family.remote.describe().images == family.llm.part.image_use
    head = load_head(str(family.folder))
    assert torch.equal(head.weight, family.llm.part.head.weight)


def test_prompts_are_those_of_the_familys_own_processor(family: Family) -> None:
    features = family.edge.encode(family.edge.preprocess(pictures()))
    for image, feature, (question, answer) in zip(pictures(), features, ASKED, strict=True):
        prompt = family.edge.prompt(question, answer)
        ids = family.edge.unfold(prompt.ids, feature) + prompt.answer
        tokens = token_count(feature.shape) // ids.count(family.edge.image_token_id)
        mine = [i for token in ids for i in [token] * (tokens if token == family.edge.image_token_id else 1)]
        assert mine == whole_inputs(family, image, question, answer)["input_ids"][0].tolist()
        sizes = ImageSizes(family.whole.config, load_image_processor(find_model(str(family.folder))))
        assert sizes.of(image) == tuple(feature.shape)


def whole_run(family: Family, whole: Any, nano: NanoEdge) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and logits of each sample alone, with the adapters inside the undivided model."""
    plain = whole.model.get_image_features

    def adapted(*args: Any, **kwargs: Any) -> Any:
        found = plain(*args, **kwargs)
        rows = found.pooler_output
        found.pooler_output = (
            nano.layer("image")(rows) if torch.is_tensor(rows) else [nano.layer("image")(row) for row in rows]
        )
        return found

    hook = whole.get_input_embeddings().register_forward_hook(lambda _m, _a, rows: nano.layer("text")(rows))
    whole.model.get_image_features = adapted
    losses, logits = [], []
    try:
        for image, (question, answer) in zip(pictures(), ASKED, strict=True):
            inputs = whole_inputs(family, image, question, answer)
            inputs = {n: v.to(whole.dtype) if v.is_floating_point() else v for n, v in inputs.items()}
            count = len(nano.edge.prompt(question, answer).answer)
            found = whole(**inputs, use_cache=False).logits[0, -count - 1 : -1]
            logits.append(found)
            losses.append(torch.nn.functional.cross_entropy(found, inputs["input_ids"][0, -count:]))
    finally:
        hook.remove()
        del whole.model.get_image_features
    return losses, logits


def test_losses_logits_and_adapter_gradients_are_the_whole_models(family: Family) -> None:
    whole = multimodal_class(family.whole.config).from_pretrained(family.folder, dtype=torch.float64).eval()
    edge, part = split_model(whole, str(family.folder))
    nano = nano_of(edge).double()
    batch = batch_of(family, nano)
    llm = LocalLLM(part)
    logits, _, _ = llm.token_logits(batch.embeds, batch.mask, batch.labels, batch.images)
    losses = llm.loss(batch.embeds, batch.mask, batch.labels, images=batch.images)
    losses.mean().backward()
    got = {name: leaf.grad.clone() for name, leaf in nano.layers.named_parameters()}
    nano.zero_grad()
    expected, their_logits = whole_run(family, whole, nano)
    torch.stack(expected).mean().backward()
    torch.testing.assert_close(logits, torch.cat(their_logits), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-6, atol=1e-8)
    for name, leaf in nano.layers.named_parameters():
        assert float((got[name] - leaf.grad).norm() / leaf.grad.norm()) < 1e-5, name  # positions are float32


def gradients(nano: NanoEdge, loss: Tensor) -> dict[str, Tensor]:
    nano.zero_grad()
    loss.mean().backward()
    return {name: leaf.grad.clone() for name, leaf in nano.layers.named_parameters()}


def test_every_exchange_gives_the_same_gradients(family: Family) -> None:
    """Full, factored and label-private steps through a host, and steps of several requests in one pass."""
    nano = nano_of(family.edge)
    whole = multimodal_class(family.whole.config).from_pretrained(family.folder).eval()
    theirs, _ = whole_run(family, whole, nano)
    want = gradients(nano, torch.stack(theirs))

    def compare(losses: Tensor) -> None:
        torch.testing.assert_close(losses.detach(), torch.stack(theirs).detach(), rtol=1e-4, atol=1e-5)
        for name, gradient in gradients(nano, losses).items():
            assert float((gradient - want[name]).norm() / want[name].norm()) < 1e-4, name

    def full(llm: LanguageModel) -> Tensor:
        batch = batch_of(family, nano)
        return llm.loss(batch.embeds, batch.mask, batch.labels, images=batch.images)

    compare(full(family.llm))
    compare(full(family.remote))
    address, head = family.host.address, load_head(str(family.folder))
    with RemoteLLM(address, insecure=True, head=head) as private:
        compare(full(private))
    with RemoteLLM(address, insecure=True, factored=True) as factored:
        features = nano.edge.encode(nano.edge.preprocess(pictures()))
        for _ in range(2):  # the second time the samples are kept
            parts = nano.factor([nano.edge.prompt(*asked) for asked in ASKED], features)
            assert parts is not None
            compare(factored.factored_loss(parts))
    batch = batch_of(family, nano)
    inside = batch.embeds, batch.mask, batch.labels
    local, remote = family.llm.score(*inside, batch.images), family.remote.score(*inside, batch.images)
    for mine, its in zip(local, remote, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_answers_are_the_whole_models(family: Family) -> None:
    nano = NanoEdge(family.edge, {"text": create("nano", rank=2)}, seed=0)  # a fresh adapter changes nothing
    batch = batch_of(family, nano, answers=False)
    whole = multimodal_class(family.whole.config).from_pretrained(family.folder).eval()
    for llm in (family.llm, family.remote):
        got = llm.generate(batch.embeds, batch.mask, 6, nano.embed_new, batch.images)
        alone = llm.generate(batch.embeds, batch.mask, 6, None, batch.images)
        assert torch.equal(got, alone)
        for row, (image, (question, _)) in enumerate(zip(pictures(), ASKED, strict=True)):
            inputs = whole_inputs(family, image, question, None)
            length = inputs["input_ids"].shape[1]
            said = whole.generate(
                **inputs,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=0,
            )[0, length:].tolist()
            assert got[row, : len(said)].tolist() == said


def test_where_images_stand_matters_and_is_checked(family: Family) -> None:
    nano = nano_of(family.edge)
    batch = batch_of(family, nano)
    inside = batch.embeds.detach(), batch.mask, batch.labels
    with_, without = family.llm.loss(*inside, images=batch.images), family.llm.loss(*inside)
    same = torch.equal(with_, without)
    assert same == (family.llm.part.image_use is ImageUse.PLAIN)
    length = int(batch.mask[1].sum())
    wrong: list[tuple[Any, str]] = [
        ([[], []], "got those of 2 samples"),
        ([[], [ImageSpan(length - 3, 2, 2)], []], f"sample 1 of {length} tokens has an image of 2 x 2"),
        ([[], [], [ImageSpan(4, 1, 4), ImageSpan(2, 1, 2)]], "sample 2"),
        ([[ImageSpan(1, 0, 4)], [], []], "sample 0"),
        ([[ImageSpan(-1, 1, 4)], [], []], "sample 0"),
    ]
    for images, says in wrong:
        for llm in (family.llm, family.remote):
            with pytest.raises(HostRefused, match=says):
                llm.loss(*inside, images=images)
            with pytest.raises(HostRefused, match=says):
                llm.generate(*inside[:2], 1, None, images)


def test_another_family_is_told(tmp_path: Path) -> None:
    from transformers import PaliGemmaConfig

    PaliGemmaConfig(vision_config={"projection_dim": 8}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"another family \(model_type 'paligemma'\).*Qwen2-VL.*Gemma 3"):
        load_edge(str(tmp_path))


def test_a_model_that_passes_more_than_embeddings_is_told() -> None:
    from transformers import AutoModelForImageTextToText

    config = AutoConfig.for_model("qwen3_vl")
    config.text_config.num_hidden_layers = config.vision_config.depth = 1
    config.vision_config.deepstack_visual_indexes = [0]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(ModelError, match="its decoder takes deepstack_visual_embeds"):
        sides_of(model)


def test_pan_and_scan_is_told(tmp_path: Path) -> None:
    save("gemma3", tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(file.read_text().replace("{", '{"do_pan_and_scan": true, ', 1))
    with pytest.raises(ModelError, match="set do_pan_and_scan to false"):
        load_edge(str(tmp_path))
