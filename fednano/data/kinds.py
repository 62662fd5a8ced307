"""What a row can be, and how each kind becomes a question with an answer.

A language model is tuned on questions and answers, so every kind ends as one: a text with its class, an image with
its class, a sentence with its named entities, a conversation with what the assistant says in it. Only the answer is
ever learnt; everything before it is prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fednano.data.options import DataOptions
from fednano.data.rows import BadRowError
from fednano.data.sample import Sample
from fednano.data.tagging import entities
from fednano.errors import DataError

__all__ = ["KINDS", "Kind", "Reading", "choice_question", "detect"]

Values = Mapping[str, Any]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Reading:
    """What converting a row may need beside it.

    Attributes:
        options: names of columns.
        classes: column -> class names, where the source knows them.
        image: turns an image column's value into a file; raises BadRowError.
    """

    options: DataOptions
    classes: Mapping[str, Sequence[str]]
    image: Callable[[Any], Path | None]


@dataclass(frozen=True)
class Kind:
    """One kind of data.

    Attributes:
        convert: row, its sample id and the reading to samples; raises BadRowError.
        metrics: names in `fednano.evaluation.METRICS` that fit, the one to judge by first.
        columns: what a row has, in words for messages.
        classes: whether answers are classes, by which clients can differ.
    """

    convert: Callable[[Values, str, Reading], list[Sample]]
    metrics: tuple[str, ...]
    columns: str
    classes: bool = True


def text_of(value: object, key: str) -> str:
    """A column that must be a non-empty string. Raises BadRowError."""
    if value is None:
        raise BadRowError(f"{key} is missing")
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"{key} must be a non-empty string, got {value!r:.80}")
    return value


def _column(values: Values, given: str, *usual: str) -> tuple[str, Any]:
    """Name and value of a column: the one named by an option, else the first of the usual ones that is there."""
    names = (given,) if given else usual
    found = next((name for name in names if values.get(name) is not None), names[0])
    return found, values.get(found)


def _text(values: Values, given: str, *usual: str) -> str:
    name, value = _column(values, given, *usual)
    return text_of(value, name)


_TEXTS = ("text", "sentence", "content", "review", "document")
_LABELS = ("label", "labels", "class", "category", "target")
_IMAGES = ("image", "img", "file_name")
_TAGS = ("ner_tags", "tags", "labels", "pos_tags")


def _vqa(values: Values, identity: str, reading: Reading) -> list[Sample]:
    options = reading.options
    answers = values.get("answers") or []
    if isinstance(answers, list):
        answers = [each.get("answer") if isinstance(each, dict) else each for each in answers]
    if not isinstance(answers, list) or not all(isinstance(text, str) and text.strip() for text in answers):
        raise BadRowError(f"answers must be a list of non-empty strings, got {answers!r:.80}")
    name, answer = _column(values, options.answer, "answer", "multiple_choice_answer")
    if answer is None and answers:
        # most_common keeps the order of first appearance among equals, so that the choice does not depend on hashing
        answer = Counter(answers).most_common(1)[0][0]
    image = reading.image(_column(values, options.image, *_IMAGES)[1])
    question = _text(values, options.question, "question")
    return [Sample(identity, image, question, text_of(answer, name), tuple(answers))]


def choice_question(question: str, choices: Sequence[str], hint: str = "") -> str:
    """A multiple-choice question as one text; its answer is a letter."""
    listed = "\n".join(f"({LETTERS[place]}) {choice}" for place, choice in enumerate(choices))
    context = f"Context: {hint.strip()}\n" if hint.strip() else ""
    return f"{context}{question}\n{listed}\nAnswer with the letter."


def _choice(values: Values, identity: str, reading: Reading) -> list[Sample]:
    choices, right = values.get("choices"), values.get(reading.options.answer or "answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise BadRowError(f"choices must be a list of 2 to {len(LETTERS)} texts, got {choices!r:.80}")
    if isinstance(right, str) and right in choices:
        right = choices.index(right)
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise BadRowError(
            f"answer must be the number of a choice from 0 to {len(choices) - 1}, got {right!r}"
        )
    question = choice_question(
        _text(values, reading.options.question, "question"),
        [text_of(each, "a choice") for each in choices],
        str(values.get("hint") or ""),
    )
    image = reading.image(_column(values, reading.options.image, *_IMAGES)[1])
    return [Sample(identity, image, question, LETTERS[right])]


_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def _instruction(values: Values, identity: str, reading: Reading) -> list[Sample]:
    image = reading.image(_column(values, reading.options.image, *_IMAGES)[1])
    turns = values.get("messages", values.get("conversations"))
    if turns is not None:
        return _chat(turns, identity, image)
    question = _text(values, reading.options.question, "instruction", "prompt", "question")
    more = values.get("input") or ""
    if not isinstance(more, str):
        raise BadRowError(f"input must be a string, got {more!r:.80}")
    answer = _text(values, reading.options.answer, "output", "completion", "response", "answer")
    system = values.get("system") or ""
    history = (("system", text_of(system, "system")),) if system else ()
    return [
        Sample(
            identity, image, f"{question}\n\n{more}" if more.strip() else question, answer, history=history
        )
    ]


def _chat(turns: object, identity: str, image: Path | None) -> list[Sample]:
    """One sample for each thing that the assistant says, with all that was said before as its history."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRowError(f"messages must be a list of objects with role and content, got {turns!r:.80}")
    said: list[tuple[str, str]] = []
    samples: list[Sample] = []
    replies = 0
    for turn in turns:
        role = _ROLES.get(str(turn.get("role", turn.get("from"))), str(turn.get("role", turn.get("from"))))
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):  # parts, of which images stand in a column of their own
            content = " ".join(
                str(part["text"]) for part in content if isinstance(part, dict) and "text" in part
            )
        if isinstance(content, str) and image is not None:
            content = content.replace("<image>", "").strip()
        text = text_of(content, f"the content of {role}")
        expected = "assistant" if said and said[-1][0] == "user" else "user"
        if role == "system" and not said:
            said.append((role, text))
            continue
        if role != expected:
            raise BadRowError(
                f"messages must alternate: expected {expected} after {said[-1:]!r:.60}, got {role}"
            )
        if role == "assistant":
            replies += 1
            samples.append(
                Sample(f"{identity}#{replies}", image, said[-1][1], text, history=tuple(said[:-1]))
            )
        said.append((role, text))
    if not samples:
        raise BadRowError("messages hold nothing that the assistant says")
    if len(samples) == 1:
        samples = [
            Sample(identity, image, samples[0].question, samples[0].answer, history=samples[0].history)
        ]
    return samples


def _class_name(name: str, value: object, reading: Reading) -> str:
    """The name of a class: given by its number in a list of names, or by itself."""
    names = reading.options.class_names or tuple(reading.classes.get(name, ()))
    if isinstance(value, str) and value.strip().lstrip("-").isdigit() and names:
        value = int(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and names:
        if not 0 <= value < len(names):
            raise BadRowError(f"{name} is {value}; there are {len(names)} classes, from 0")
        return names[value]
    if isinstance(value, int | float):
        return f"{value:g}"
    return text_of(value, name).strip()


def _ask(reading: Reading, name: str, text: str, default: str) -> str:
    """The question for a class, from the option ``prompt`` or the default one."""
    names = reading.options.class_names or tuple(reading.classes.get(name, ()))
    listed = ", ".join(names) if len(names) <= 30 else ""
    if reading.options.prompt:
        return reading.options.prompt.replace("{labels}", listed).replace("{text}", text)
    choose = f" Choose one of: {listed}." if listed else ""
    return f"{default}{choose}" + (f"\n{text}" if text else "")


def _text_class(values: Values, identity: str, reading: Reading) -> list[Sample]:
    text = _text(values, reading.options.text, *_TEXTS)
    name, value = _column(values, reading.options.label, *_LABELS)
    question = _ask(reading, name, text, "Which class does this text belong to?")
    return [Sample(identity, None, question, _class_name(name, value, reading))]


def _image_class(values: Values, identity: str, reading: Reading) -> list[Sample]:
    column, value = _column(values, reading.options.image, *_IMAGES)
    image = reading.image(value)
    if image is None:
        raise BadRowError(f"{column} is missing")
    name, value = _column(values, reading.options.label, *_LABELS)
    question = _ask(reading, name, "", "What does the image show?")
    return [Sample(identity, image, question, _class_name(name, value, reading))]


def _tokens(values: Values, identity: str, reading: Reading) -> list[Sample]:
    word_column, words = _column(values, reading.options.tokens, "tokens", "words")
    tag_column, tags = _column(values, reading.options.tags, *_TAGS)
    words, tags = (each.split() if isinstance(each, str) else each for each in (words, tags))
    for name, value in ((word_column, words), (tag_column, tags)):
        if not isinstance(value, list) or not value:
            raise BadRowError(f"{name} must be a list with one entry a word, got {value!r:.80}")
    assert isinstance(words, list)
    assert isinstance(tags, list)
    if len(words) != len(tags):
        raise BadRowError(
            f"there are {len(words)} {word_column} and {len(tags)} {tag_column}; expected as many"
        )
    named = [_class_name(tag_column, tag, reading) for tag in tags]
    found = entities([text_of(word, f"a word of {word_column}") for word in words], named)
    prompt = (
        reading.options.prompt
        or "List the tagged parts of this text as 'type: words', separated by ';'.\n{text}"
    )
    answer = "; ".join(f"{kind}: {text}" for kind, text in found) or "none"
    return [Sample(identity, None, prompt.replace("{text}", " ".join(words)), answer)]


KINDS: dict[str, Kind] = {
    "vqa": Kind(_vqa, ("vqa", "exact-match", "token-f1"), "question and answer (or answers), image"),
    "multiple-choice": Kind(
        _choice, ("choice",), "question, choices (a list) and answer (a number from 0), image"
    ),
    "instruction": Kind(
        _instruction,
        ("rouge-l", "token-f1", "exact-match"),
        "instruction, input and output, or messages with role and content",
        classes=False,
    ),
    "text-classification": Kind(_text_class, ("exact-match", "macro-f1"), "text and label"),
    "token-classification": Kind(
        _tokens,
        ("entity-f1", "exact-match"),
        "tokens and tags (lists, or words apart by spaces)",
        classes=False,
    ),
    "image-classification": Kind(_image_class, ("exact-match", "macro-f1"), "image and label"),
}
"""Kind of data by name."""


def detect(columns: set[str], options: DataOptions, where: Path | str) -> str:
    """The kind of rows that have these columns.

    Raises:
        DataError: no kind fits.
    """

    def has(given: str, *usual: str) -> bool:
        return given in columns if given else bool(columns & set(usual))

    tests = {
        "instruction": bool(columns & {"messages", "conversations"})
        or {"instruction", "output"} <= columns
        or ("prompt" in columns and bool(columns & {"completion", "response"})),
        "multiple-choice": has(options.question, "question") and "choices" in columns,
        "token-classification": has(options.tokens, "tokens", "words") and has(options.tags, *_TAGS),
        "text-classification": has(options.text, *_TEXTS) and has(options.label, *_LABELS),
        "image-classification": has(options.image, *_IMAGES) and has(options.label, *_LABELS),
        "vqa": has(options.question, "question") or has(options.answer, "answer", "answers"),
    }
    for kind, fits in tests.items():
        if fits:
            return kind
    kinds = "; ".join(f"{name}: {kind.columns}" for name, kind in KINDS.items())
    raise DataError(
        f"{where} has the columns {', '.join(sorted(columns)) or 'none'}, which fit no kind of data ({kinds}). Say "
        'which it is with --data-kind, and which column is what with --data-options \'text="..." label="..."\'.'
    )
