"""How to read a data set: which column is what, which files are which split.

The setting ``data-options`` carries these as ``'text="review" label="stars" test="validation"'``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fednano.errors import DataError, did_you_mean

__all__ = ["DataOptions"]


@dataclass(frozen=True)
class DataOptions:
    """Names of columns and splits; empty means: find it by its usual name.

    Attributes:
        text: column of the text to classify.
        label: column of its class, a name or a number.
        labels: names of the classes, separated by commas; needed where the column holds numbers only.
        tokens: column of a sentence's words.
        tags: column of the words' tags.
        question: column of the question or instruction.
        answer: column of the answer.
        image: column of the image, a path or bytes.
        id: column of the sample's name.
        prompt: what is asked of text or image to classify, with ``{text}`` and ``{labels}`` to fill in.
        group: column that the data is divided by; the setting ``partition-by`` sets it.
        train: name of the training split or file.
        test: name of the test split or file.
        subset: configuration of a Hugging Face data set, such as a language.
        map: keep rows in a memory-mapped file however few they are.
    """

    text: str = ""
    label: str = ""
    labels: str = ""
    tokens: str = ""
    tags: str = ""
    question: str = ""
    answer: str = ""
    image: str = ""
    id: str = ""
    prompt: str = ""
    group: str = ""
    train: str = ""
    test: str = ""
    subset: str = ""
    map: bool = False

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DataOptions:
        """Build from settings.

        Raises:
            DataError: an unknown name, or a value of the wrong type.
        """
        known = {spec.name: spec for spec in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in known:
                hint = did_you_mean(name, known) or f" Known: {', '.join(sorted(known))}."
                raise DataError(f"unknown data option {name!r}.{hint}")
            if type(value) is not type(known[name].default):
                raise DataError(
                    f"data option {name} is {value!r}; expected {type(known[name].default).__name__}, such as "
                    f"{name}={'true' if name == 'map' else chr(34) + name + chr(34)}."
                )
        return cls(**values)

    @property
    def class_names(self) -> tuple[str, ...]:
        """``labels`` as a list."""
        return tuple(part.strip() for part in self.labels.split(",") if part.strip())
