"""What is exported answers as the tuned model does, in the hands of transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from fednano.errors import ConfigError, ModelError, RunError
from fednano.exporting import FORMATS, export_run
from fednano.federation.config import RunConfig
from fednano.federation.model import build_edge
from fednano.models.edge import NanoEdge
from fednano.models.language import LocalLLM
from fednano.models.load import load_language, load_whole
from fednano.runs import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
QUESTIONS = ["what color is the shape?", "is there a circle?", "what is it?"]


def make_run(folder: Path, **settings: Any) -> tuple[str, NanoEdge]:
    """A run folder with adapters far from their start, as a long run would leave."""
    config = RunConfig.from_mapping({"rank": 4, **settings})
    edge = build_edge(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in edge.layers.values():
            for leaf in layer.theta.values():
                leaf.add_(0.1 * torch.randn(leaf.shape, generator=generator))
    run = RunFolder.create(folder, "export", config.to_mapping(), command=["fednano"])
    run.save_adapter(edge.travelling(), {"edge": edge.edge.fingerprint})
    run.close()
    return str(run.path), edge


def logits(edge: NanoEdge, whole: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Last logits ``(3, V)`` for three questions, by the split model and by the whole one."""
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    pixels = edge.edge.preprocess([picture])
    features = edge.edge.encode(pixels)[0]
    llm = LocalLLM(load_language("tiny"))
    here, there = [], []
    for question in QUESTIONS:
        prompt = edge.edge.prompt(question, None, image=True)
        with torch.no_grad():
            batch = edge([prompt], [features])
            out = llm.part.decoder(inputs_embeds=batch.embeds, use_cache=False)
            here.append(llm.part.head(out.last_hidden_state[:, -1])[0])
            ids: list[int] = []
            for token in prompt.ids:
                ids += [token] * (len(features) if token == edge.edge.image_token_id else 1)
            whole_out = whole(
                input_ids=torch.tensor([ids]), pixel_values=pixels["pixel_values"].to(whole.dtype)
            )
            there.append(whole_out.logits[0, -1])
    return torch.stack(here), torch.stack(there)


@pytest.mark.parametrize(
    "settings",
    [{}, {"streams": "image"}, {"streams": "text"}, {"adapter": "lora", "rank": 3}, {"adapter": "loca"}],
    ids=str,
)
def test_peft_and_merged_exports_give_the_tuned_models_logits(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run, edge = make_run(tmp_path / "runs", **settings)
    full_rank = {"rank": 160} if settings.get("adapter") == "loca" else {}
    done = export_run(run, "peft", **full_rank)
    assert all(site.error < 1e-6 for site in done.sites)
    model = peft.PeftModel.from_pretrained(load_whole("tiny"), str(done.folder))
    here, there = logits(edge, model)
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)
    merged = export_run(run, "merged")
    model = LlavaForConditionalGeneration.from_pretrained(merged.folder)
    here, there = logits(edge, model)
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)
    _, untuned = logits(edge, load_whole("tiny"))
    assert float((untuned - here).abs().max()) > 0.1  # the comparison can fail


def test_a_low_rank_export_says_what_it_loses(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "runs", adapter="loca")
    small, large = (export_run(run, "peft", rank=r, out=tmp_path / str(r)).sites for r in (2, 20))
    for few, many in zip(small, large, strict=True):
        assert (few.rank, many.rank) == (2, 20)
        assert 1 > few.error > many.error > 0
        assert f"{few.error:.3g}" in str(few)


def test_safetensors_are_the_runs_own(tmp_path: Path) -> None:
    run, edge = make_run(tmp_path / "runs")
    done = export_run(run, "safetensors")
    leaves = load_file(done.folder / "adapter.safetensors")
    assert all(torch.equal(leaves[name], value) for name, value in edge.travelling().items())


def test_a_merged_model_is_a_model_to_tune_again(tmp_path: Path) -> None:
    """Tokeniser and image processor travel along: the folder is a whole model."""
    run, edge = make_run(tmp_path / "runs")
    folder = export_run(run, "merged").folder
    again = build_edge(RunConfig.from_mapping({"model": str(folder), "rank": 2}))
    assert again.edge.fingerprint != edge.edge.fingerprint
    question = edge.edge.prompt(QUESTIONS[0], "red", image=True)
    assert again.edge.prompt(QUESTIONS[0], "red", image=True) == question


@pytest.mark.parametrize("kind", FORMATS)
def test_the_card_says_what_it_is_and_how_to_use_it(kind: str, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "runs")
    card = (export_run(run, kind).folder / "README.md").read_text()
    front = dict(line.split(": ", 1) for line in card.split("---")[1].strip().splitlines())
    assert json.loads(front["base_model"]) == "tiny"
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    assert ("linear_2" in card) == (kind == "peft")


def test_mistakes_are_named(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "runs", activation="gelu")
    with pytest.raises(ModelError, match="not linear in its input"):
        export_run(run, "merged")
    assert not (Path(run) / "export").exists() or not list((Path(run) / "export").iterdir())
    with pytest.raises(ConfigError, match="peft, merged, safetensors"):
        export_run(run, "gguf")
    with pytest.raises(ConfigError, match="only with format 'peft'"):
        export_run(run, "merged", rank=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="not empty"):
        export_run(run, "safetensors", out=tmp_path / "full")
    with pytest.raises(RunError):
        export_run("nothing", runs_dir=tmp_path)
