"""Every metric against an independent formula or library."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from fednano.errors import ConfigError, DataError
from fednano.training.objectives import inverted_hinge
from fednano.unlearning.metrics import (
    UTILITY_PARTS,
    TokenScores,
    attack_auc,
    auc,
    exact_memorisation,
    extraction_likelihood,
    extraction_strength,
    forget_quality,
    inverted_hinge_score,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    model_utility,
    priv_leak,
    probability,
    reference_score,
    rouge_l,
    truth_ratio,
    truth_ratio_score,
    zlib_score,
)

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=7)
SCORES = st.lists(st.floats(-3, 3).map(lambda x: round(x, 1)), min_size=1, max_size=20)  # with ties
LOSSES = st.lists(st.floats(0, 8), min_size=1, max_size=6)


def random_scores(length: int, seed: int, vocabulary: int = 7) -> tuple[TokenScores, np.ndarray, np.ndarray]:
    """Scores of random labels under a random distribution, the distribution ``(T, V)`` and the labels ``(T,)``."""
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.ones(vocabulary), size=length)
    labels = random.integers(0, vocabulary, size=length)
    log = np.log(p)
    mean = (p * log).sum(1)
    deviation = np.sqrt((p * log**2).sum(1) - mean**2)
    rival = np.array([np.delete(row, y).max() for row, y in zip(log, labels, strict=True)])
    scores = TokenScores(log[np.arange(length), labels], p.argmax(1) == labels, mean, deviation, rival)
    return scores, p, labels


@settings(deadline=None, max_examples=30)
@given(a=WORDS, b=WORDS)
def test_rouge_l_equals_enumeration_of_all_subsequences(a: list[str], b: list[str]) -> None:
    def subsequences(words: list[str]) -> set[tuple[str, ...]]:
        return {c for size in range(len(words) + 1) for c in itertools.combinations(words, size)}

    longest = max(map(len, subsequences(a) & subsequences(b)))
    got = rouge_l(" ".join(a).upper() + "!", ", ".join(b))
    if not longest:
        assert got == rouge_l("", "")
        assert (got.recall, got.precision, got.f1) == (0, 0, 0)
        return
    assert got.recall == longest / len(b)
    assert got.precision == longest / len(a)
    assert got.f1 == pytest.approx(stats.hmean([got.recall, got.precision]))


@settings(deadline=None, max_examples=30)
@given(flags=st.lists(st.booleans(), min_size=1, max_size=12))
def test_extraction_strength_is_the_longest_right_ending(flags: list[bool]) -> None:
    shortest = next(k for k in range(len(flags) + 1) if all(flags[k:]))
    assert extraction_strength(flags) == pytest.approx(1 - shortest / len(flags))


def test_extraction_strength_of_an_answer_that_ends_wrongly_is_zero() -> None:
    assert extraction_strength([True, True, False]) == 0.0  # a published version says 1/3


@given(length=st.integers(1, 12), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_probability_and_memorisation_from_the_distribution(length: int, seed: int) -> None:
    scores, p, labels = random_scores(length, seed)
    assert probability(scores) == pytest.approx(stats.gmean(p[np.arange(length), labels]))
    assert exact_memorisation(scores) == np.mean(
        [row.argmax() == y for row, y in zip(p, labels, strict=True)]
    )
    hinge = inverted_hinge(torch.tensor(np.log(p)), torch.tensor(labels)).mean().item()
    assert inverted_hinge_score(scores) == pytest.approx(hinge)
    nll = torch.nn.functional.cross_entropy(torch.tensor(np.log(p)), torch.tensor(labels))
    assert loss_score(scores) == pytest.approx(nll.item())


def test_extraction_likelihood_of_parrots_and_strangers() -> None:
    answer = list(range(20))
    perfect = {t: answer[t:] for t in range(20)}
    assert extraction_likelihood(answer, perfect) == 1.0
    assert extraction_likelihood(answer, {t: [99] * 30 for t in range(20)}) == 0.0
    assert extraction_likelihood(answer[:9], perfect) is None
    assert extraction_likelihood(answer, {}) is None
    # One place wrong in the middle: count by hand the bigrams that survive.
    said = {0: [0, 1, 7, 3, 4]}
    assert extraction_likelihood([0, 1, 2, 3, 4], said, n=2) == 2 / 4
    # A repeated n-gram counts as often as it is said; what lies beyond the answer does not.
    assert extraction_likelihood([0, 1, 0, 2], {0: [0, 1, 0, 1, 9, 9]}, n=2) == 3 / 3


@settings(deadline=None, max_examples=25)
@given(answer=st.lists(st.integers(0, 2), max_size=9), said=st.lists(st.integers(0, 2), max_size=9))
def test_extraction_likelihood_equals_a_count_over_strings(answer: list[int], said: list[int]) -> None:
    def grams(tokens: list[int]) -> list[str]:
        text = "".join(map(str, tokens))
        return [text[i : i + 2] for i in range(len(text) - 1)]

    terms = []
    for t in range(len(answer)):
        truth = grams(answer[t:])
        if truth:
            found = grams(said[: len(answer) - t])
            terms.append(sum(g in truth for g in found) / len(truth))
    got = extraction_likelihood(answer, dict.fromkeys(range(len(answer)), said), n=2)
    assert got == (pytest.approx(sum(terms) / len(terms)) if terms else None)


@settings(deadline=None, max_examples=30)
@given(members=SCORES, others=SCORES)
def test_auc_equals_scikit_learn(members: list[float], others: list[float]) -> None:
    labels = [0] * len(members) + [1] * len(others)
    assert auc(members, others) == pytest.approx(roc_auc_score(labels, [*members, *others]))
    assert auc(members, others) + auc(others, members) == pytest.approx(1)


def test_bootstrap_interval_has_the_width_of_the_asymptotic_one() -> None:
    random = np.random.default_rng(0)
    members, others = random.normal(0, 1, 150), random.normal(0.7, 1, 120)
    got = attack_auc(members, others, resamples=4000, seed=3)
    assert got.low < got.value < got.high
    # DeLong's variance from the placements of each sample.
    placed = (others[None, :] > members[:, None]).astype(float)
    deviation = math.sqrt(
        placed.mean(1).var(ddof=1) / len(members) + placed.mean(0).var(ddof=1) / len(others)
    )
    assert got.high - got.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert attack_auc(members, others, seed=5) == attack_auc(members, others, seed=5)
    assert attack_auc(members, others, seed=5) != attack_auc(members, others, seed=6)
    assert (attack_auc([0.0], [1.0]).low, attack_auc([0.0], [1.0]).high) == (1.0, 1.0)


@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 30), seed=st.integers(0, 99))
def test_min_k_against_a_sort_in_torch(length: int, seed: int) -> None:
    scores, p, labels = random_scores(length, seed)
    count = max(1, math.floor(0.4 * length))
    log = torch.tensor(np.log(p))
    own = log[torch.arange(length), torch.tensor(labels)]
    lowest = own.topk(count, largest=False).values
    assert min_k_score(scores) == pytest.approx(-lowest.mean().item())
    weights = torch.tensor(p)
    mean = (weights * log).sum(1)
    deviation = (weights * (log - mean[:, None]).square()).sum(1).sqrt()
    standard = ((own - mean) / deviation).topk(count, largest=False).values
    assert min_k_plus_plus_score(scores) == pytest.approx(-standard.mean().item())
    assert min_k_score(scores, 1.0) == pytest.approx(loss_score(scores))


def test_zlib_and_reference_scores() -> None:
    scores, *_ = random_scores(5, 1)
    other, *_ = random_scores(5, 2)
    assert zlib_score(scores, "aaaa" * 50) > zlib_score(scores, "".join(map(chr, range(40, 120))))
    assert reference_score(scores, other) == pytest.approx(loss_score(scores) - loss_score(other))
    assert reference_score(scores, scores) == 0


def test_priv_leak_is_zero_at_the_reference_and_signed_as_published() -> None:
    assert priv_leak(0.5) == 0
    assert priv_leak(0.999) == pytest.approx(-99.8)  # still memorised
    assert priv_leak(0.3) == pytest.approx(40)  # sticks out
    assert priv_leak(0.6, 0.6) == 0
    with pytest.raises(DataError, match="AUC of 1"):
        priv_leak(0.5, 1.0)
    with pytest.raises(DataError, match=r"\[0, 1\]"):
        priv_leak(1.2)


@settings(deadline=None, max_examples=25)
@given(wrong=LOSSES, paraphrase=st.floats(0, 8))
def test_truth_ratio_as_a_ratio_of_probabilities(wrong: list[float], paraphrase: float) -> None:
    p = np.exp(-np.array(wrong))
    assert truth_ratio(wrong, paraphrase) == pytest.approx(stats.gmean(p) / math.exp(-paraphrase))
    arithmetic = truth_ratio(wrong, paraphrase, mean="arithmetic")
    assert arithmetic == pytest.approx(p.mean() / math.exp(-paraphrase))
    assert arithmetic >= truth_ratio(wrong, paraphrase) * (1 - 1e-12)


def test_truth_ratio_scores() -> None:
    assert truth_ratio_score([0.5, 2.0], forget=True) == 0.5
    assert truth_ratio_score([0.5, 2.0], forget=False) == 0.25
    assert truth_ratio_score([0.0], forget=True) == 0.0
    for call in (lambda: truth_ratio([], 1.0), lambda: truth_ratio([math.nan], 1.0)):
        with pytest.raises(DataError, match="at least one wrong answer"):
            call()
    with pytest.raises(ConfigError, match="'geometric' or 'arithmetic'"):
        truth_ratio([1.0], 1.0, mean="harmonic")
    with pytest.raises(DataError, match="at least one question"):
        truth_ratio_score([], forget=True)


@settings(deadline=None, max_examples=30)
@example(seed=602, n=5, m=5)  # p = 1, past which rounding carries scipy's exact count
@given(seed=st.integers(0, 999), n=st.integers(2, 6), m=st.integers(2, 6))
def test_forget_quality_equals_counting_all_arrangements(seed: int, n: int, m: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.normal(size=n), random.normal(size=m)

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        grid = np.concatenate([x, y])
        return float(np.abs((x[None] <= grid[:, None]).mean(1) - (y[None] <= grid[:, None]).mean(1)).max())

    got = forget_quality(a, b)
    both = np.concatenate([a, b])
    rest = [np.delete(both, list(chosen)) for chosen in itertools.combinations(range(n + m), n)]
    taken = [both[list(chosen)] for chosen in itertools.combinations(range(n + m), n)]
    as_far = [distance(x, y) >= distance(a, b) - 1e-12 for x, y in zip(taken, rest, strict=True)]
    assert got.statistic == pytest.approx(distance(a, b))
    assert got.p == pytest.approx(np.mean(as_far))
    assert (got.n, got.n_reference) == (n, m)
    # Logarithm and reciprocal of the ratios are the same test: only the order counts.
    assert forget_quality(np.exp(-a), np.exp(-b)).p == pytest.approx(got.p)
    assert forget_quality(b, a).p == pytest.approx(got.p)


def test_forget_quality_of_equal_and_disjoint_samples() -> None:
    assert forget_quality([1.0, 2.0], [1.0, 2.0]).p == 1
    far = forget_quality(np.arange(300), np.arange(300) + 1000)
    assert far.statistic == 1
    assert far.log10_p < -100
    with pytest.raises(DataError, match="got 0 and 1"):
        forget_quality([], [1.0])


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.floats(0.01, 1), min_size=9, max_size=9))
def test_model_utility_is_the_harmonic_mean_of_nine(values: list[float]) -> None:
    parts = dict(zip(UTILITY_PARTS, values, strict=True))
    assert model_utility(parts) == pytest.approx(stats.hmean(values))
    assert model_utility(parts | {UTILITY_PARTS[4]: 0.0}) == 0
    with pytest.raises(DataError, match="nine parts"):
        model_utility(dict(list(parts.items())[1:]))
    with pytest.raises(DataError, match=r"in \[0, 1\]"):
        model_utility(parts | {UTILITY_PARTS[0]: 1.5})


def test_bad_scores_are_refused() -> None:
    with pytest.raises(DataError, match="0 members and 1 others"):
        auc([], [1.0])
    with pytest.raises(DataError, match="finite"):
        auc([math.nan], [1.0])
    with pytest.raises(ConfigError, match=r"in \(0, 1\]"):
        min_k_score(random_scores(3, 0)[0], 0.0)
    with pytest.raises(ConfigError, match="resamples"):
        attack_auc([0.0], [1.0], resamples=0)
    with pytest.raises(DataError, match="T >= 1"):
        extraction_strength([])
    with pytest.raises(DataError, match="five arrays"):
        TokenScores(np.zeros(2), np.zeros(3, bool), *[np.zeros(2)] * 3)
