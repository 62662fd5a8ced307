"""Each method's steps at the owner: what they move, what they leave alone, and what a host can serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fednano.adapters import create
from fednano.data import Sample
from fednano.errors import ConfigError, TrainingDiverged
from fednano.host import RemoteLLM, serve
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.language import LocalLLM
from fednano.training.answers import answer_losses
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.training.targets import without_end
from fednano.unlearning.local import LocalSettings, reference_of, refusals, steps
from fednano.unlearning.methods import get_method, method_names, method_table
from fednano.unlearning.probe import extraction_likelihoods, token_scores

Tuned = Callable[..., NanoEdge]
SETTINGS = LocalSettings(steps=12, batch_size=4, learning_rate=0.02)
APPROXIMATE = [name for name in method_names() if name != "retrain"]


def owner_steps(
    nano: NanoEdge,
    llm: Any,
    texts: list[Sample],
    name: str,
    *,
    settings: LocalSettings = SETTINGS,
    **changes: Any,
) -> dict[str, Tensor]:
    features = FeatureCache(nano.edge)
    forget, retain = ClientData(texts[:3], nano, features), ClientData(texts[3:], nano, features)
    refusal = refusals(forget, nano, features)
    reference = reference_of(nano, llm, forget, refusal)
    before = {
        "forget": answer_losses(nano, llm, forget).mean(),
        "retain": answer_losses(nano, llm, retain).mean(),
        "refusal": answer_losses(nano, llm, refusal).mean(),
    }
    moving = {n: torch.ones_like(v, dtype=torch.bool) for n, v in nano.travelling().items()}
    arguments = {
        "retain": retain,
        "moving": moving,
        "seed": 0,
        "client": "a",
        "round_number": 1,
        "method": get_method(name),
        "forget": forget,
        "refusal": refusal,
        "reference": reference,
    }
    result = steps(nano, llm, settings, **{**arguments, **changes})
    assert result.steps == settings.steps
    assert (result.retain_loss is None) == (get_method(name).retain == "nothing")
    after = {
        "forget": answer_losses(nano, llm, forget).mean(),
        "retain": answer_losses(nano, llm, retain).mean(),
        "refusal": answer_losses(nano, llm, refusal).mean(),
    }
    return {key: after[key] - before[key] for key in after}


@pytest.fixture(scope="session")
def memorised(parts: tuple[EdgePart, LocalLLM], texts: list[Sample]) -> dict[str, Tensor]:
    """Leaves of an adapter that knows all texts."""
    nano = NanoEdge(parts[0], {"text": create("nano", rank=4)}, seed=0)
    data = ClientData(texts, nano, FeatureCache(parts[0]))
    moving = {n: torch.ones_like(v, dtype=torch.bool) for n, v in nano.travelling().items()}
    hard = LocalSettings(steps=60, batch_size=12, learning_rate=0.08)
    steps(nano, parts[1], hard, retain=data, moving=moving, seed=0, client="all", round_number=1)
    assert answer_losses(nano, parts[1], data).mean() < 2.5  # of 5.3 where it knows nothing
    return nano.travelling()


def knowing(parts: tuple[EdgePart, LocalLLM], leaves: dict[str, Tensor]) -> NanoEdge:
    nano = NanoEdge(parts[0], {"text": create("nano", rank=4)}, seed=0)
    nano.load_travelling(leaves)
    return nano


@pytest.mark.parametrize("name", APPROXIMATE)
def test_every_method_does_what_it_says(
    name: str, memorised: dict[str, Tensor], parts: tuple[EdgePart, LocalLLM], texts: list[Sample]
) -> None:
    change = owner_steps(knowing(parts, memorised), parts[1], texts, name)
    assert change["forget"] > 0.1
    if name in ("dpo", "idk"):
        assert change["refusal"] < -0.5
    if get_method(name).retain == "cross_entropy":
        assert change["retain"] < change["forget"]
        ascent = owner_steps(knowing(parts, memorised), parts[1], texts, "gradient_ascent")
        assert change["retain"] < ascent["retain"] - 0.1


def test_kl_keeps_the_retained_distribution_nearer_than_ascent_alone(
    memorised: dict[str, Tensor], parts: tuple[EdgePart, LocalLLM], texts: list[Sample]
) -> None:
    def distance(name: str) -> float:
        nano, llm = knowing(parts, memorised), parts[1]
        data = ClientData(texts[3:], nano, FeatureCache(nano.edge))

        @torch.no_grad()
        def distribution() -> Tensor:
            batch = nano(*data.batch(range(9)))
            return llm.token_logits(batch.embeds, batch.mask, batch.labels)[0].log_softmax(-1)

        before = distribution()
        owner_steps(nano, llm, texts, name)
        return float((before.exp() * (before - distribution())).sum(-1).mean())

    assert distance("kl") < 0.97 * distance("gradient_ascent")


@pytest.mark.parametrize("kernels", ["off", "on"])
def test_what_is_not_moving_keeps_its_bits(
    kernels: str,
    tuned: Tuned,
    parts: tuple[EdgePart, LocalLLM],
    texts: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDNANO_KERNELS", kernels)
    nano = tuned(rank=4)
    before = nano.travelling()
    moving = {name: torch.zeros_like(leaf, dtype=torch.bool) for name, leaf in before.items()}
    moving["text.A"][:, :2] = True
    owner_steps(nano, parts[1], texts, "loku", moving=moving)
    after = nano.travelling()
    for name, leaf in before.items():
        assert torch.equal(after[name][~moving[name]], leaf[~moving[name]])
    assert not torch.equal(after["text.A"][:, :2], before["text.A"][:, :2])


@pytest.mark.parametrize("name", ["loku", "kl", "npo"])
def test_the_projects_kernels_make_the_same_steps(
    name: str,
    memorised: dict[str, Tensor],
    parts: tuple[EdgePart, LocalLLM],
    texts: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = []
    for mode in ("off", "on"):
        monkeypatch.setenv("FEDNANO_KERNELS", mode)
        nano = knowing(parts, memorised)
        owner_steps(nano, parts[1], texts, name, settings=LocalSettings(steps=4, batch_size=4, clip_norm=0.5))
        ends.append(nano.travelling())
    for leaf, value in ends[0].items():
        torch.testing.assert_close(ends[1][leaf], value, rtol=1e-4, atol=1e-6)
        assert not torch.equal(value, memorised[leaf])


def test_other_parties_take_cross_entropy_steps(
    tuned: Tuned, parts: tuple[EdgePart, LocalLLM], texts: list[Sample]
) -> None:
    nano, llm = tuned(rank=4), parts[1]
    data = ClientData(texts, nano, FeatureCache(nano.edge))
    before = answer_losses(nano, llm, data).mean()
    moving = {n: torch.ones_like(v, dtype=torch.bool) for n, v in nano.travelling().items()}
    result = steps(nano, llm, SETTINGS, retain=data, moving=moving, seed=0, client="b", round_number=1)
    assert result.forget_loss is None
    assert answer_losses(nano, llm, data).mean() < before - 0.1


def test_a_host_serves_all_methods_but_kl_with_the_same_result(
    tuned: Tuned, parts: tuple[EdgePart, LocalLLM], texts: list[Sample]
) -> None:
    short = LocalSettings(steps=2, batch_size=4, learning_rate=0.02)
    with serve(parts[1], grace=1.0) as host, RemoteLLM(host.address, insecure=True) as remote:
        for name in ("loku", "gradient_difference", "npo", "simnpo", "dpo"):
            here, there = tuned(rank=4), tuned(rank=4)
            owner_steps(here, parts[1], texts, name, settings=short)
            owner_steps(there, remote, texts, name, settings=short)
            for leaf, value in here.travelling().items():
                torch.testing.assert_close(there.travelling()[leaf], value, rtol=1e-3, atol=1e-5)
        with pytest.raises(ConfigError, match="'kl' needs the language model's whole distribution"):
            owner_steps(tuned(rank=4), remote, texts, "kl", settings=short)


def test_divergence_is_named(tuned: Tuned, parts: tuple[EdgePart, LocalLLM], texts: list[Sample]) -> None:
    wild = LocalSettings(steps=6, batch_size=4, learning_rate=1e38, optimizer="sgd")
    with pytest.raises(TrainingDiverged, match="a, round 1 of unlearning, step"):
        owner_steps(tuned(rank=4), parts[1], texts, "gradient_ascent", settings=wild)


def test_settings_and_names_are_checked() -> None:
    for change in ({"steps": 0}, {"optimizer": "magic"}, {"npo_beta": 0.0}):
        with pytest.raises(ConfigError):
            LocalSettings(**change)
    with pytest.raises(ConfigError, match="unknown unlearning method"):
        get_method("")
    assert [row["method"] for row in method_table()] == list(method_names())


def test_token_scores_equal_the_undivided_model(
    tuned: Tuned, parts: tuple[EdgePart, LocalLLM], texts: list[Sample]
) -> None:
    """Against logits of the whole padded batch under an attention mask, one sample at a time."""
    nano, llm = tuned(rank=4), parts[1]
    data = ClientData(texts, nano, FeatureCache(nano.edge))
    got = token_scores(nano, llm, data, batch_size=5)
    assert len(got) == len(texts)
    end = nano.edge.tokenizer.eos_token_id
    for index in (0, 4, 11):
        batch = nano(*data.batch([index]))
        with torch.no_grad():
            hidden = llm.part.decoder(inputs_embeds=batch.embeds, use_cache=False).last_hidden_state[0, :-1]
        y = without_end(batch.labels, end)[0, 1:]
        assert int((batch.labels != -100).sum()) == int((y != -100).sum()) + 1  # the end token, and no other
        p = llm.part.head(hidden[y != -100]).double().softmax(-1).detach()
        y = y[y != -100]
        log = p.log()
        torch.testing.assert_close(
            torch.tensor(got[index].log_probs), log.gather(1, y[:, None])[:, 0], rtol=1e-4, atol=1e-6
        )
        assert got[index].correct.tolist() == (p.argmax(-1) == y).tolist()
        others = log.masked_fill(torch.nn.functional.one_hot(y, log.shape[1]).bool(), -torch.inf)
        torch.testing.assert_close(torch.tensor(got[index].rival), others.amax(-1), rtol=1e-4, atol=1e-6)
        mean = (p * log).sum(-1)
        torch.testing.assert_close(torch.tensor(got[index].mean), mean, rtol=1e-4, atol=1e-6)
        spread = ((p * log.square()).sum(-1) - mean.square()).sqrt()
        torch.testing.assert_close(torch.tensor(got[index].deviation), spread, rtol=1e-3, atol=1e-5)


def test_extraction_likelihood_of_a_model_that_only_knows_its_own_words(
    tuned: Tuned, parts: tuple[EdgePart, LocalLLM], texts: list[Sample]
) -> None:
    """An answer that the model itself generated is extracted from its prompt alone: every continuation repeats it."""
    nano, llm = tuned(rank=4), parts[1]
    features = FeatureCache(nano.edge)
    tokenizer = nano.edge.tokenizer
    long = Sample("long", None, texts[0].question, "yes no red circle yes no blue square yes no red circle")
    data = ClientData([long, texts[1]], nano, features)
    likelihood, short = extraction_likelihoods(nano, llm, data, n=3)
    assert short is None  # too short an answer for three-grams is no evidence either way
    assert likelihood is not None
    assert 0 <= likelihood < 0.5  # a random model does not know it
    (prompt,), _ = data.batch([0])
    answer = prompt.answer[:-1]
    assert prompt.answer[-1] == tokenizer.eos_token_id

    class Parrot:
        """Continues every prompt with what follows in the answer."""

        def generate(
            self, embeds: Tensor, mask: Tensor, max_new_tokens: int, embed: Any, images: Any
        ) -> Tensor:
            starts = mask.sum(1) - len(prompt.ids)
            rows = [list(answer[int(start) :]) for start in starts]
            return torch.tensor([row + [0] * (max_new_tokens - len(row)) for row in rows])

    assert extraction_likelihoods(nano, Parrot(), data, n=3, samples=1, batch_size=4) == [1.0]  # type: ignore[arg-type]
