"""Measure one adapter: what is left of the forget set, what of the rest, and whether membership shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor

from fednano.data import Sample
from fednano.errors import DataError
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.training.answers import answer_losses, generate_answers
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.unlearning.metrics import (
    Auc,
    ForgetQuality,
    TokenScores,
    attack_auc,
    exact_memorisation,
    extraction_strength,
    forget_quality,
    inverted_hinge_score,
    loss_score,
    memorisation_accuracy,
    min_k_plus_plus_score,
    min_k_score,
    priv_leak,
    probability,
    reference_score,
    rouge_l,
    truth_ratio,
    zlib_score,
)
from fednano.unlearning.probe import extraction_likelihoods, token_scores

__all__ = [
    "Comparison",
    "Measurement",
    "Perturbed",
    "SetScores",
    "SiteMeasurement",
    "against_reference",
    "attacks",
    "mean_probability",
    "measure_site",
    "score_set",
    "truth_ratios",
]


@dataclass(frozen=True)
class Perturbed:
    """Other answers to a question, from which its truth ratio follows.

    Attributes:
        paraphrase: the right answer in other words.
        wrong: wrong answers of the same form, at least one.
    """

    paraphrase: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class SetScores:
    """Means over a set of samples. Without the end token, as everything here.

    Attributes:
        samples: how many.
        loss: nats a token.
        probability: see `fednano.unlearning.metrics`, as the following.
        exact_memorisation: share of right tokens.
        extraction_strength: share of the answer that follows by itself.
        ma: memorisation accuracy.
        el: extraction likelihood ``EL_10``; ``None`` where no answer is long enough: not defined.
        ihl: inverted hinge loss.
        rouge_l: ROUGE-L recall of greedy answers; ``None`` where none were generated.
        truth_ratios: of each sample; empty where no other answers are known.
    """

    samples: int
    loss: float
    probability: float
    exact_memorisation: float
    extraction_strength: float
    ma: float
    el: float | None
    ihl: float
    rouge_l: float | None = None
    truth_ratios: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """One adapter, seen from all sides.

    Attributes:
        forget: on the forget set.
        retain: on retained training samples of the owner, or of others where it keeps none; ``None`` where those are
            out of reach.
        unseen: on samples that were never trained on.
        utility: mean answer probability on the test questions.
        accuracy: share of test questions whose whole answer is the likeliest, token by token.
        clients: client to the mean answer probability on what it held out.
        attacks: membership inference, forget set against unseen samples, by name of the attack.
        priv_leak: PrivLeak of Min-K against the chance level 0.5, in percent.
    """

    forget: SetScores
    retain: SetScores | None
    unseen: SetScores
    utility: float
    accuracy: float
    clients: dict[str, float]
    attacks: dict[str, Auc]
    priv_leak: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class SiteMeasurement:
    """What the owner's samples say of an adapter; see `Measurement`."""

    forget: SetScores
    retain: SetScores | None
    unseen: SetScores
    attacks: dict[str, Auc]
    priv_leak: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> SiteMeasurement:
        """Inverse of :meth:`to_json`.

        Raises:
            DataError: the content is something else.
        """
        try:
            sets = {
                name: None
                if body[name] is None
                else SetScores(**{**body[name], "truth_ratios": tuple(body[name]["truth_ratios"])})
                for name in ("forget", "retain", "unseen")
            }
            forget, unseen = sets["forget"], sets["unseen"]
            if forget is None or unseen is None:
                raise KeyError("forget, unseen")
            found = {name: Auc(**each) for name, each in body["attacks"].items()}
            return cls(forget, sets["retain"], unseen, found, float(body["priv_leak"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"a site's figures cannot be read: {error!r}.") from error


@dataclass(frozen=True)
class Comparison:
    """An unlearned adapter against one that was trained without the samples; ``None``: not available.

    Attributes:
        forget_quality: of the forget set's truth ratios; ``None`` without a reference, or where no other answers are
            known.
        priv_leak: of Min-K, relative to the reference's own AUC.
        exact_memorisation_gap: difference of the forget set's exact memorisation, unlearned minus reference.
        extraction_strength_gap: the same of extraction strength.
    """

    forget_quality: ForgetQuality | None = None
    priv_leak: float | None = None
    exact_memorisation_gap: float | None = None
    extraction_strength_gap: float | None = None


def against_reference(after: Measurement, reference: Measurement | None) -> Comparison:
    """Compare with a retrained adapter, measured on the same scope.

    Args:
        after: of the unlearned adapter.
        reference: of the retrained one; ``None`` where there is none: then nothing is available, and nothing invented.
    """
    if reference is None:
        return Comparison()
    ours, theirs = after.forget, reference.forget
    known = ours.truth_ratios and theirs.truth_ratios
    level = reference.attacks["min_k"].value
    return Comparison(
        forget_quality(ours.truth_ratios, theirs.truth_ratios) if known else None,
        priv_leak(after.attacks["min_k"].value, level) if level < 1 else None,
        ours.exact_memorisation - theirs.exact_memorisation,
        ours.extraction_strength - theirs.extraction_strength,
    )


def mean_probability(edge: NanoEdge, llm: LanguageModel, data: ClientData) -> float:
    """Mean answer probability of the adapters as they are."""
    return fmean(map(probability, token_scores(edge, llm, data)))


def measure_site(
    edge: NanoEdge,
    llm: LanguageModel,
    features: FeatureCache,
    sets: Mapping[str, ClientData],
    *,
    leaves: Mapping[str, Tensor],
    untuned: Mapping[str, Tensor],
    perturbed: Mapping[str, Perturbed] | None = None,
    seed: int,
) -> SiteMeasurement:
    """Everything that the owner's samples say of an adapter; the edge is left with its leaves.

    Args:
        edge: NanoEdge of the run.
        llm: the language model, here or on a host.
        features: of the samples.
        sets: ``"forget"`` and ``"unseen"``, and ``"retain"`` where there is any.
        leaves: the adapter.
        untuned: as the seed made it; the reference of an attack.
        perturbed: sample id to other answers, for truth ratios.
        seed: of the bootstrap.
    """
    edge.load_travelling(untuned)
    before = {name: token_scores(edge, llm, sets[name]) for name in ("forget", "unseen")}
    edge.load_travelling(leaves)
    scores = {name: token_scores(edge, llm, data) for name, data in sets.items()}
    scored = {
        name: score_set(
            edge,
            llm,
            data,
            scores=scores[name],
            features=features,
            perturbed=perturbed if name == "forget" else None,
            el=name != "retain",
        )
        for name, data in sets.items()
    }
    found, leak = attacks(
        scores["forget"],
        scores["unseen"],
        texts=([s.answer for s in sets["forget"].samples], [s.answer for s in sets["unseen"].samples]),
        reference=(before["forget"], before["unseen"]),
        seed=seed,
    )
    return SiteMeasurement(scored["forget"], scored.get("retain"), scored["unseen"], found, leak)


def score_set(
    edge: NanoEdge,
    llm: LanguageModel,
    data: ClientData,
    *,
    scores: Sequence[TokenScores] | None = None,
    features: FeatureCache | None = None,
    perturbed: Mapping[str, Perturbed] | None = None,
    el: bool = True,
) -> SetScores:
    """Score a set of samples.

    Args:
        edge: NanoEdge with the adapters to use.
        llm: the language model, here or on a host.
        data: the samples.
        scores: of their tokens, where they are known already.
        features: given, greedy answers are generated and their ROUGE-L is measured.
        perturbed: sample id to other answers, for truth ratios.
        el: whether extraction likelihood, which generates from many prefixes, is measured.
    """
    scores = token_scores(edge, llm, data) if scores is None else scores
    likelihoods = extraction_likelihoods(edge, llm, data) if el else []
    defined = [value for value in likelihoods if value is not None]
    rouge = None
    if features is not None:
        longest = max(len(each.log_probs) for each in scores) + 1
        said = generate_answers(edge, llm, features, data.samples, max_new_tokens=longest)
        rouge = fmean(rouge_l(text, s.answer).recall for text, s in zip(said, data.samples, strict=True))
    return SetScores(
        samples=len(data),
        loss=fmean(each.loss for each in scores),
        probability=fmean(map(probability, scores)),
        exact_memorisation=fmean(map(exact_memorisation, scores)),
        extraction_strength=fmean(extraction_strength(each.correct) for each in scores),
        ma=fmean(map(memorisation_accuracy, scores)),
        el=fmean(defined) if defined else None,
        ihl=fmean(map(inverted_hinge_score, scores)),
        rouge_l=rouge,
        truth_ratios=truth_ratios(edge, llm, data, features, perturbed) if perturbed and features else (),
    )


def truth_ratios(
    edge: NanoEdge,
    llm: LanguageModel,
    data: ClientData,
    features: FeatureCache,
    perturbed: Mapping[str, Perturbed],
) -> tuple[float, ...]:
    """Truth ratio (geometric) of each sample that has other answers, in order."""
    found = []
    for sample in data.samples:
        other = perturbed.get(sample.id)
        if other is not None:
            rows: list[Sample] = [replace(sample, answer=text) for text in (other.paraphrase, *other.wrong)]
            losses = answer_losses(edge, llm, ClientData(rows, edge, features)).tolist()
            found.append(truth_ratio(losses[1:], losses[0]))
    return tuple(found)


def attacks(
    members: Sequence[TokenScores],
    others: Sequence[TokenScores],
    *,
    texts: tuple[Sequence[str], Sequence[str]],
    reference: tuple[Sequence[TokenScores], Sequence[TokenScores]],
    seed: int,
) -> tuple[dict[str, Auc], float]:
    """Membership inference with bootstrap intervals, and PrivLeak of Min-K.

    Args:
        members: scores of the forget set's tokens.
        others: of samples that were never trained on.
        texts: the answers of both.
        reference: the same under a model that saw neither: here, before any tuning.
        seed: of the bootstrap.
    """
    groups = (members, others)
    pairs = {
        "loss": [[loss_score(s) for s in group] for group in groups],
        "zlib": [
            [zlib_score(s, text) for s, text in zip(group, own, strict=True)]
            for group, own in zip(groups, texts, strict=True)
        ],
        "min_k": [[min_k_score(s) for s in group] for group in groups],
        "min_k_plus_plus": [[min_k_plus_plus_score(s) for s in group] for group in groups],
        "reference": [
            [reference_score(s, r) for s, r in zip(group, own, strict=True)]
            for group, own in zip(groups, reference, strict=True)
        ],
    }
    found = {name: attack_auc(left, right, seed=seed) for name, (left, right) in pairs.items()}
    return found, priv_leak(found["min_k"].value)
