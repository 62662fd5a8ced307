"""Metrics against formulas worked out another way, and the properties they must have."""

from __future__ import annotations

import itertools
import math
import statistics
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.errors import DataError
from fednano.evaluation import across_clients, exact_match, normalise, score, token_f1, vqa_accuracy

TEXT = st.text(max_size=30)
WORDS = st.lists(st.sampled_from(["cat", "dog", "red", "blue", "seven"]), max_size=6).map(" ".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" The Two Dogs. ", "2 dogs"),
        ("A cat", "cat"),
        ("don't", "dont"),
        ("dont", "dont"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("(3.5)", "3.5"),
        ("10:30.", "10:30"),
        ("red/blue", "red blue"),
        ("half-empty", "half empty"),
        ("yes,", "yes"),
        ("RED\n", "red"),
        ("the", "the"),
        ("none", "0"),
        ("+", "+"),
        ("ＲＥＤ", "red"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@settings(max_examples=50, deadline=None)
@given(TEXT)
def test_normalise_is_idempotent_and_ignores_case_and_space(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert normalise(f"  {text}\n") == once
    assert "  " not in once
    assert exact_match(text, once)


@settings(max_examples=50, deadline=None)
@given(st.from_regex(r"[a-z]{3,8}( [a-z]{3,8}){0,2}", fullmatch=True))
def test_case_and_final_punctuation_do_not_count(text: str) -> None:
    assert exact_match(text.upper() + ".", text)
    assert exact_match(f"the {text}!", text)


def test_punctuation_alone_is_told_apart() -> None:
    assert not exact_match("+", "-")
    assert exact_match(" + ", "+")


def vqa_by_hand(matches: int, people: int) -> Fraction:
    """The formula word for word: the mean over the subsets that leave one person out."""
    agreed = [True] * matches + [False] * (people - matches)
    scores = [min(Fraction(sum(rest), 3), Fraction(1)) for rest in itertools.combinations(agreed, people - 1)]
    return sum(scores, Fraction(0)) / len(scores)


@pytest.mark.parametrize("people", [2, 3, 10])
def test_vqa_accuracy_is_the_official_formula(people: int) -> None:
    for matches in range(people + 1):
        answers = ["cat"] * matches + [f"other {k}" for k in range(people - matches)]
        for order in (answers, answers[::-1]):
            assert vqa_accuracy("A cat.", order) == pytest.approx(
                float(vqa_by_hand(matches, people)), abs=1e-12
            )


def test_vqa_accuracy_of_ten_answers_as_published() -> None:
    """0, 0.3, 0.6, 0.9, 1 for zero to four agreeing people of ten: the values that the evaluation is known for."""
    got = [vqa_accuracy("x", ["x"] * k + ["y"] * (10 - k)) for k in range(5)]
    assert got == pytest.approx([0, 0.3, 0.6, 0.9, 1.0])


@settings(max_examples=50, deadline=None)
@given(TEXT, TEXT)
def test_vqa_accuracy_with_one_answer_is_exact_match(said: str, right: str) -> None:
    assert vqa_accuracy(said, [right]) == float(exact_match(said, right))


def test_vqa_accuracy_needs_an_answer() -> None:
    with pytest.raises(DataError, match="at least one answer"):
        vqa_accuracy("x", [])


def f1_by_hand(said: list[str], right: list[str]) -> float:
    common, left = 0, list(right)
    for word in said:
        if word in left:
            left.remove(word)
            common += 1
    if not said or not right:
        return float(said == right)
    precision, recall = common / len(said), common / len(right)
    return 0.0 if common == 0 else 2 * precision * recall / (precision + recall)


@settings(max_examples=50, deadline=None)
@given(WORDS, WORDS)
def test_token_f1(said: str, right: str) -> None:
    value = token_f1(said, right)
    words = [w.replace("seven", "7") for w in said.split()], [w.replace("seven", "7") for w in right.split()]
    assert value == pytest.approx(f1_by_hand(*words), abs=1e-12)
    assert value == token_f1(right, said)
    assert (value == 1) == (sorted(words[0]) == sorted(words[1]))


def test_scores() -> None:
    got = score(["Yes.", "red", "no", "a red"], ["yes", "red", "yes", "blue"])
    assert got.samples == 4
    assert got.accuracy == 0.5
    assert {k: (v.correct, v.samples) for k, v in got.per_label.items()} == {
        "blue": (0, 1),
        "red": (1, 1),
        "yes": (1, 2),
    }
    assert got.balanced_accuracy == pytest.approx((0 + 1 + 0.5) / 3)
    assert got.vqa == 0.5
    several = score(["x", "y"], ["x", "z"], [["x"] * 3 + ["y"] * 7, []])
    assert several.vqa == pytest.approx(0.9 / 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=20))
def test_scores_are_means(pairs: list[tuple[str, str]]) -> None:
    said, right = [a for a, _ in pairs], [b for _, b in pairs]
    got = score(said, right)
    assert got.accuracy == pytest.approx(statistics.fmean(exact_match(a, b) for a, b in pairs))
    assert got.token_f1 == pytest.approx(statistics.fmean(token_f1(a, b) for a, b in pairs))
    assert sum(label.samples for label in got.per_label.values()) == len(pairs)
    assert sum(label.correct for label in got.per_label.values()) == round(got.accuracy * len(pairs))
    weighted = math.fsum(v.accuracy * v.samples for v in got.per_label.values()) / len(pairs)
    assert weighted == pytest.approx(got.accuracy)


def test_scores_refuse_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="2 predictions, 1 answers"):
        score(["a", "b"], ["a"])
    with pytest.raises(DataError, match="at least one"):
        score([], [])
    with pytest.raises(DataError, match="0 answer lists"):
        score(["a"], ["a"], [])


CLIENTS = st.dictionaries(
    st.sampled_from("abcdefgh"), st.tuples(st.floats(-100, 100), st.floats(0.1, 1000)), min_size=1, max_size=8
)


@settings(max_examples=50, deadline=None)
@given(CLIENTS, st.booleans())
def test_across_clients(table: dict[str, tuple[float, float]], higher: bool) -> None:
    values = {k: v for k, (v, _) in table.items()}
    weights = {k: w for k, (_, w) in table.items()}
    got = across_clients(values, weights, higher_is_better=higher)
    exact = sum((Fraction(v) * Fraction(w) for v, w in table.values()), Fraction(0))
    assert got.mean == pytest.approx(float(exact / sum(map(Fraction, weights.values()))), abs=1e-9)
    assert got.deviation == pytest.approx(statistics.pstdev(values.values()), abs=1e-9)
    assert (got.low, got.high) == (min(values.values()), max(values.values()))
    assert values[got.worst_client] == (got.low if higher else got.high)
    assert got.low - 1e-9 <= got.mean <= got.high + 1e-9
    # arrival order must not change a bit
    turned = across_clients(
        dict(reversed(values.items())), dict(reversed(weights.items())), higher_is_better=higher
    )
    assert turned == got


def test_across_clients_without_weights_and_ties() -> None:
    got = across_clients({"b": 0.5, "a": 0.5, "c": 0.8})
    assert got.mean == got.plain_mean == pytest.approx(0.6)
    assert got.worst_client == "a"
    assert got.clients == 3


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ({}, None, "there are none"),
        ({"a": math.nan}, None, "Client a reported nan"),
        ({"a": 1.0}, {"b": 1.0}, "same clients"),
        ({"a": 1.0}, {"a": 0.0}, "not all zero"),
        ({"a": 1.0}, {"a": -1.0}, "not negative"),
        ({"a": 1.0}, {"a": math.inf}, "finite"),
    ],
)
def test_across_clients_refuses(
    values: dict[str, float], weights: dict[str, float] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        across_clients(values, weights)
