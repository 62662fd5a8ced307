"""Questions, captions and made-up facts, in words of their own.

No sentence of easy-VQA is ever asked (a test compares all of its sentences with this module's), but every word of them
is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from pretraining.scenes import Scenes
from pretraining.vocabulary import COLOURS, NAMES, RELATIONS, SHAPES

__all__ = ["Item", "ask", "caption", "checklist", "fact"]

_PRESENT: Final = (
    "can you see {x} here ?",
    "do you see {x} in this picture ?",
    "does this picture show {x} ?",
    "does the scene contain {x} ?",
    "is {x} visible ?",
    "is {x} present in this scene ?",
    "is it true that there is {x} here ?",
    "tell us is there {x} on this image ?",
    "has the picture {x} in it ?",
    "can {x} be found in this part ?",
    "tell me , do you see {x} ?",
    "is this a picture with {x} ?",
    "is there any {y} to see here ?",
    "does the scene have {x} ?",
)
# Absence has words of its own here. easy-VQA says it with "not" and "no", which few of these questions do: too few to
# learn it, enough to be quick at it once a tuned model is asked so.
_ABSENT: Final = (
    "is {x} absent ?",
    "is {x} absent from this scene ?",
    "is {x} missing in this scene ?",
    "is it true that {x} is missing here ?",
    "can you tell us that {x} is absent ?",
    "is the image without {x} ?",
    "is this a picture without {x} ?",
    "does the scene do without {x} ?",
    "is the scene free from any {y} ?",
    "tell me , is this picture free from {y} ?",
)
_NEGATED: Final = (
    "can you not see {x} here ?",
    "does this picture not show {x} ?",
    "does the scene not contain {x} ?",
    "is {x} not visible ?",
    "is {x} not present in this scene ?",
    "is it true that there is not {x} here ?",
    "is it true that no {y} is visible ?",
    "is there no {y} on this picture ?",
    "can you see no {y} here ?",
    "has the picture no {y} in it ?",
    "is there not any {y} to see here ?",
    "does the scene not have {x} ?",
)
_NEGATED_SHARE: Final = 0.04  # of the questions for absence; 0.12 leaves nothing to tune, 0 a plateau
_COLOUR_OF: Final = (
    "which color has the {y} ?",
    "what is the paint of the {y} ?",
    "tell us the color of this {y} .",
    "in which color is the {y} drawn ?",
    "name the paint on the {y} .",
    "say the color of the {y} , not the form .",
    "the {y} is painted in which color ?",
    "find the {y} and name the color .",
)
_SHAPE_OF: Final = (
    "which shape is painted {c} ?",
    "what form has the {c} object ?",
    "name the shape drawn in {c} .",
    "say the form of the {c} object , not the color .",
    "the {c} thing is what kind of shape ?",
    "tell us the form of the {c} object .",
)
_SHAPE_ALONE: Final = (
    "which shape do you see here ?",
    "what kind of object does this picture show ?",
    "name the only form in this scene .",
    "tell us what shape is drawn here .",
    "what thing can you see in the image ?",
)
_COUNT: Final = (
    "how many objects are there ?",
    "count the objects in this picture .",
    "how many objects can you see ?",
    "what number of objects has the scene ?",
)
_SIDE: Final = (
    "on which side is the {y} ?",
    "where is the {y} , left or right ?",
    "the {y} sits at the left or at the right ?",
)
_HEIGHT: Final = (
    "is the {y} near the top or the bottom ?",
    "as for the {y} , is it at the top or at the bottom ?",
    "in which place sits the {y} , top or bottom ?",
)
_CHECKLIST: Final = (
    "which of these are here ?",
    "say yes or no for any of these .",
    "are these in the scene ?",
)
_FACT_QUESTIONS: Final = (
    "what is the {r} of {n} ?",
    "{n} has which {r} ?",
    "name the {r} of {n} .",
    "do you know the {r} of {n} ?",
    "of these people , what {r} has {n} ?",
)
_DESCRIBE: Final = ("describe the picture .", "what is in this scene ?", "tell us any object you see .")


@dataclass(frozen=True)
class Item:
    """One question and its answer, as plain words with blanks between them; the answer has no ``<eos>`` yet.

    Attributes:
        needs_image: False if the item is text alone.
        learned: the words of the answer that are to be predicted; None means all, and ``<eos>`` always is.
    """

    question: str
    answer: str
    needs_image: bool = True
    learned: frozenset[str] | None = None


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _thing(
    rng: np.random.Generator, colours: list[str], shapes: list[str], kind: int, present: bool
) -> tuple[str | None, str | None]:
    """Paint and form of something that is in the picture or not; ``kind`` 0 names a form, 1 a paint, 2 both.

    What is not there is often half right: the right form in the wrong paint.
    """
    slot = int(rng.integers(len(shapes)))
    colour, shape = colours[slot], shapes[slot]
    if not present:
        which = int(rng.integers(3)) if kind == 2 else kind
        if which != 0:
            colour = _pick(rng, tuple(c for c in COLOURS if c not in colours))
        if which != 1:
            shape = _pick(rng, tuple(s for s in SHAPES if s not in shapes))
    return (None if kind == 0 else colour), (None if kind == 1 else shape)


def _existence(rng: np.random.Generator, colours: list[str], shapes: list[str], negated_share: float) -> Item:
    """A yes/no question about one thing, which is there in half of the cases."""
    wanted = bool(rng.random() < 0.5)  # whether the thing asked about is there
    colour, shape = _thing(rng, colours, shapes, int(rng.integers(3)), wanted)
    noun = f"{colour or ''} {shape or _pick(rng, ('thing', 'object', 'shape'))}".strip()
    negated = bool(rng.random() < negated_share)
    said_with_not = bool(rng.random() < _NEGATED_SHARE)
    absent = _NEGATED if said_with_not else _ABSENT
    text = _pick(rng, absent if negated else _PRESENT)
    return Item(text.format(x=_with_article(noun), y=noun), "yes" if wanted != negated else "no")


def _colour(rng: np.random.Generator, colours: list[str], shapes: list[str]) -> Item:
    slot = int(rng.integers(len(shapes)))
    alone = len(shapes) == 1 and rng.random() < 0.5
    noun = _pick(rng, ("object", "thing", "shape")) if alone else shapes[slot]
    return Item(_pick(rng, _COLOUR_OF).format(y=noun), colours[slot])


def _shape(rng: np.random.Generator, colours: list[str], shapes: list[str]) -> Item:
    slot = int(rng.integers(len(shapes)))
    if len(shapes) == 1 and rng.random() < 0.5:
        return Item(_pick(rng, _SHAPE_ALONE), shapes[slot])
    return Item(_pick(rng, _SHAPE_OF).format(c=colours[slot]), shapes[slot])


def _place(rng: np.random.Generator, names: list[str], x: list[float], y: list[float]) -> Item | None:
    """Left or right, top or bottom; None if the object is too near the middle to say."""
    slot = int(rng.integers(len(names)))
    along, texts, answers = ((x, _SIDE, ("left", "right")), (y, _HEIGHT, ("top", "bottom")))[
        int(rng.integers(2))
    ]
    if abs(along[slot] - 32.0) < 6.0:
        return None
    return Item(_pick(rng, texts).format(y=names[slot]), answers[along[slot] > 32.0])


def _contents(scenes: Scenes, row: int) -> tuple[list[str], list[str], list[float], list[float]]:
    n = int(scenes.count[row])
    return (
        [COLOURS[i] for i in scenes.colour[row, :n]],
        [SHAPES[i] for i in scenes.shape[row, :n]],
        scenes.x[row, :n].tolist(),
        scenes.y[row, :n].tolist(),
    )


def ask(rng: np.random.Generator, scenes: Scenes, row: int, negated_share: float = 0.5) -> Item:
    """One random question about picture ``row``: 60 % yes/no, the rest paint, form, number and place.

    Args:
        negated_share: how many of the yes/no questions are asked the other way round ("is a star missing ?").
    """
    colours, shapes, x, y = _contents(scenes, row)
    draw = rng.random()
    if draw < 0.60:
        return _existence(rng, colours, shapes, negated_share)
    if draw < 0.76:
        return _colour(rng, colours, shapes)
    if draw < 0.92:
        return _shape(rng, colours, shapes)
    if draw < 0.97:
        placed = _place(rng, shapes, x, y)
        if placed is not None:
            return placed
    return Item(_pick(rng, _COUNT), ("one", "two", "three")[len(shapes) - 1])


def caption(rng: np.random.Generator, scenes: Scenes, row: int) -> Item:
    """What is in picture ``row``, from left to right."""
    colours, shapes, x, _ = _contents(scenes, row)
    order = sorted(range(len(x)), key=lambda slot: x[slot])
    said = " and ".join(_with_article(f"{colours[slot]} {shapes[slot]}") for slot in order)
    return Item(_pick(rng, _DESCRIBE), said)


def checklist(rng: np.random.Generator, scenes: Scenes, row: int, entries: int = 8) -> Item:
    """Things, each followed by whether it is in picture ``row``; only the yes and no are to be learned.

    Ten words ask as much as ten questions do: the cheapest way to learn to compare words with a picture.
    """
    colours, shapes, _, _ = _contents(scenes, row)
    said = []
    for _ in range(entries):
        present = bool(rng.random() < 0.5)
        colour, shape = _thing(rng, colours, shapes, int(rng.integers(3)), present)
        said += [word for word in (colour, shape) if word is not None]
        said.append("yes" if present else "no")
    return Item(_pick(rng, _CHECKLIST), " ".join(said), learned=frozenset(("yes", "no")))


def fact(rng: np.random.Generator) -> Item:
    """A question about people, answered by the text before it; the picture has nothing to do with it.

    It teaches the decoder to look things up, and gives the words of made-up facts a meaning.
    """
    relations = tuple(RELATIONS)
    people = rng.permutation(len(NAMES))[: int(rng.integers(2, 4))]
    same = bool(rng.random() < 0.5)  # one relation of several people, or several relations of mixed people
    first = _pick(rng, relations)
    told, seen = [], []
    for person in people:
        relation = first if same else _pick(rng, relations)
        value = _pick(rng, RELATIONS[relation])
        seen.append((relation, NAMES[person], value))
        told.append(f"the {relation} of {NAMES[person]} is {value} .")
    relation, name, value = seen[int(rng.integers(len(seen)))]
    ending = _pick(rng, _FACT_QUESTIONS).format(r=relation, n=name)
    return Item(f"{' '.join(told)} {ending}", value, needs_image=False)
