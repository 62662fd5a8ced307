"""The split is invisible: edge and language part together are the undivided model, for every real class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from fednano.adapters import create
from fednano.errors import DataError, ModelError
from fednano.models.edge import NanoEdge
from fednano.models.files import find_model, read_tensors
from fednano.models.language import LocalLLM
from fednano.models.load import count_parameters, load_edge, load_language, split_model
from fednano.models.prompt import Prompt

IMAGE_TOKEN = 4  # as in the embedded model, whose tokenizer the random models borrow
TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
DECODERS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def random_llava(tower: str, decoder: str, seed: int = 0, tie: bool = False) -> LlavaForConditionalGeneration:
    vision = TOWERS[tower](
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = DECODERS[decoder](
        vocab_size=150,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        tie_word_embeddings=tie,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    made = {}
    tiny = find_model("tiny").folder
    for tower in TOWERS:
        for decoder in DECODERS:
            folder = tmp_path_factory.mktemp(f"{tower}-{decoder}")
            # Several shards, so that reading one side through the index is exercised too.
            random_llava(tower, decoder, tie=decoder == "qwen2").save_pretrained(
                folder, max_shard_size="20KB"
            )
            for file in tiny.iterdir():
                if not (folder / file.name).exists() and file.suffix != ".safetensors":
                    (folder / file.name).write_bytes(file.read_bytes())
            made[tower, decoder] = folder
    return made


def sample(model: Any, lengths: list[int], seed: int) -> tuple[list[Prompt], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for length in lengths:
        ids = torch.randint(5, 150, (length + 3,), generator=generator).tolist()
        prompts.append(Prompt((ids[0], IMAGE_TOKEN, *ids[1 : length + 1]), tuple(ids[length + 1 :])))
    return prompts, torch.randn(len(lengths), 3, 8, 8, generator=generator)


def whole_losses(
    model: LlavaForConditionalGeneration, prompts: list[Prompt], pixels: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Each sample alone through the undivided model, in its own forward."""
    losses = []
    for prompt, image in zip(prompts, pixels, strict=True):
        ids = [i for p in prompt.ids for i in ([p] if p != IMAGE_TOKEN else [IMAGE_TOKEN] * tokens)]
        full = torch.tensor([ids + list(prompt.answer)])
        labels = torch.full_like(full, -100)
        labels[0, len(ids) :] = full[0, len(ids) :]
        losses.append(model(input_ids=full, pixel_values=image[None], labels=labels).loss)
    return torch.stack(losses)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("tower", TOWERS)
def test_loaded_sides_give_the_whole_models_losses(
    tower: str, decoder: str, folders: dict[tuple[str, str], Path]
) -> None:
    folder = folders[tower, decoder]
    whole = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    edge, language = load_edge(str(folder)), load_language(str(folder))
    nano = NanoEdge(edge, {"image": create("nano", rank=2), "text": create("nano", rank=2)}, seed=0)
    prompts, pixels = sample(whole, [1, 4, 7], seed=1)
    features = edge.encode({"pixel_values": pixels})
    batch = nano(prompts, list(features))
    got = LocalLLM(language).loss(batch.embeds, batch.mask, batch.labels)
    expected = whole_losses(whole, prompts, pixels, features[0].shape[0])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decoder", DECODERS)
def test_generation_equals_the_whole_models(decoder: str, folders: dict[tuple[str, str], Path]) -> None:
    folder = folders["clip", decoder]
    whole = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    edge, language = load_edge(str(folder)), load_language(str(folder))
    nano = NanoEdge(edge, {"image": create("nano", rank=2)}, seed=0)
    prompts, pixels = sample(whole, [2, 6], seed=3)
    prompts = [Prompt(prompt.ids, ()) for prompt in prompts]
    features = edge.encode({"pixel_values": pixels})
    batch = nano(prompts, list(features))
    got = LocalLLM(language).generate(batch.embeds, batch.mask, 5)
    for row, (prompt, image) in enumerate(zip(prompts, pixels, strict=True)):
        ids = [
            i for p in prompt.ids for i in ([p] if p != IMAGE_TOKEN else [IMAGE_TOKEN] * features[0].shape[0])
        ]
        out = whole.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=image[None],
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=list(language.eos_token_ids),
            pad_token_id=language.pad_token_id,
        )[0, len(ids) :]
        assert got[row, : len(out)].tolist() == out.tolist()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    streams=st.sampled_from([("image",), ("text",), ("image", "text")]),
    act=st.sampled_from(["linear", "gelu"]),
)
def test_adapter_gradients_equal_those_inside_the_whole_model(
    lengths: list[int], seed: int, streams: tuple[str, ...], act: str
) -> None:
    """The same adapters, put inside the undivided model by hooks on connector and embedding, get the same gradients."""
    whole = random_llava("clip", "llama", seed=7).double()
    edge, language = split_model(whole, "tiny")
    nano = NanoEdge(edge, {s: create("nano", rank=3, act=act) for s in streams}, seed=seed).double()
    for stream in streams:  # B = 0 at the start would make A's gradient zero everywhere
        with torch.no_grad():
            nano.layer(stream).theta["B"].normal_(generator=torch.Generator().manual_seed(seed))
    prompts, pixels = sample(whole, lengths, seed)
    pixels = pixels.double()
    features = edge.encode({"pixel_values": pixels})
    batch = nano(prompts, list(features))
    LocalLLM(language).loss(batch.embeds, batch.mask, batch.labels).mean().backward()
    got = {name: parameter.grad.clone() for name, parameter in nano.layers.named_parameters()}
    nano.zero_grad()

    def adapt(stream: str) -> Any:
        return lambda module, args, output: nano.layer(stream)(output)

    hooks = []
    if "image" in streams:
        hooks.append(whole.model.multi_modal_projector.register_forward_hook(adapt("image")))
    if "text" in streams:
        hooks.append(whole.model.language_model.embed_tokens.register_forward_hook(adapt("text")))
    try:
        whole_losses(whole, prompts, pixels, features[0].shape[0]).mean().backward()
    finally:
        for hook in hooks:
            hook.remove()
    assert got
    for name, parameter in nano.layers.named_parameters():
        error = float((got[name] - parameter.grad).norm() / parameter.grad.norm())
        assert error <= 1e-6, (name, error)


def test_the_edge_never_reads_the_decoder(folders: dict[tuple[str, str], Path]) -> None:
    edge = load_edge(str(folders["clip", "llama"]))
    names = [name for name, _ in edge.named_parameters()]
    assert not [name for name in names if "self_attn" in name and "vision_tower" not in name]
    counted = count_parameters(str(folders["clip", "llama"]))
    assert sum(p.numel() for p in edge.parameters()) == counted["edge"] < counted["model"]


def test_reading_one_side_works_without_the_other_sides_shards(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = folders["clip", "llama"]
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {
        shard for key, shard in index.items() if "language_model.layers" not in key and "lm_head" not in key
    }
    for file in source.iterdir():
        if file.suffix != ".safetensors" or file.name in wanted:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert len(list(tmp_path.glob("*.safetensors"))) < len(list(source.glob("*.safetensors")))
    assert load_edge(str(tmp_path)).fingerprint == load_edge(str(source)).fingerprint
    with pytest.raises(ModelError, match="weights are missing"):
        load_language(str(tmp_path))


def test_prompt_and_answer_ids_are_those_of_the_whole_text() -> None:
    edge = load_edge("tiny")
    prompt = edge.prompt("is there a red circle?", "yes")
    text = edge.tokenizer.decode(prompt.ids + prompt.answer)
    assert "red circle" in text
    assert "yes" in text
    assert prompt.answer[-1] == edge.tokenizer.eos_token_id
    assert prompt.ids == edge.prompt("is there a red circle?", None).ids
    assert prompt.ids.count(edge.image_token_id) == 1
    with pytest.raises(ModelError, match="placeholder"):
        edge.prompt("what is <image> this?", "yes")


def test_images_and_placeholders_must_agree() -> None:
    edge = load_edge("tiny")
    nano = NanoEdge(edge, {"text": create("nano", rank=2)}, seed=0)
    with pytest.raises(DataError, match="placeholders"):
        nano([edge.prompt("is it red?", "yes")], [None])


class TestBadModels:
    def test_unknown_name(self) -> None:
        with pytest.raises(ModelError, match="no model 'nobody/nothing'"):
            load_edge("nobody/nothing")

    def test_folder_without_model(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no config\.json"):
            load_edge(str(tmp_path))

    def test_file_instead_of_folder(self, tmp_path: Path) -> None:
        (tmp_path / "weights.bin").write_bytes(b"")
        with pytest.raises(ModelError, match="is a file"):
            load_edge(str(tmp_path / "weights.bin"))

    def test_text_only_model(self, tmp_path: Path) -> None:
        LlamaConfig().save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="weights are missing"):
            load_edge(str(tmp_path))

    def test_missing_weights(self, tmp_path: Path, folders: dict[tuple[str, str], Path]) -> None:
        source = folders["clip", "llama"]
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        with pytest.raises(ModelError, match="weights are missing"):
            load_edge(str(tmp_path))

    def test_missing_tensor(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        model = random_llava("clip", "llama")
        model.save_pretrained(tmp_path)
        tensors = read_tensors(find_model(str(tmp_path)), lambda key: "linear_2.bias" not in key)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"lacks 1 tensors.*linear_2\.bias"):
            load_edge(str(tmp_path))

    def test_damaged_weights(self, tmp_path: Path, folders: dict[tuple[str, str], Path]) -> None:
        random_llava("clip", "llama").save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        with pytest.raises(ModelError, match="cannot be read as safetensors"):
            load_edge(str(tmp_path))

    def test_index_that_points_elsewhere(self, tmp_path: Path) -> None:
        random_llava("clip", "llama").save_pretrained(tmp_path, max_shard_size="20KB")
        index = tmp_path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"] = dict.fromkeys(content["weight_map"], "../elsewhere.safetensors")
        index.write_text(json.dumps(content))
        with pytest.raises(ModelError, match="plain file name"):
            load_edge(str(tmp_path))
