"""easy-VQA: simple questions about a coloured shape, read from the PyPI package of that name.

The package (version 1.0, MIT licence) carries its images and questions: 4,000 images with 38,575 questions to
train on, 1,000 images with 9,673 questions to test on, 13 answers (yes, no, 8 colours, 3 shapes). Nothing is
downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path

from fednano.data.sample import Dataset, Sample
from fednano.errors import DataError

__all__ = ["load_easy_vqa"]

SPLITS = ("train", "test")


def load_easy_vqa(split: str = "train") -> Dataset:
    """Load easy-VQA.

    Args:
        split: ``"train"`` (38,575 samples) or ``"test"`` (9,673 samples).

    Returns:
        The samples in the order of the package. Ids are ``"easy-vqa/<split>/<row>"``, the row with five
        digits.

    Raises:
        DataError: unknown split, the package is not installed, or its files are damaged.
    """
    if split not in SPLITS:
        raise DataError(f"easy-vqa has no split {split!r}; it has 'train' and 'test'. Ask for one of those.")
    try:
        import easy_vqa
    except ImportError as error:
        raise DataError(
            "The data set easy-vqa needs the package of that name. Install it: pip install easy-vqa==1.0"
        ) from error
    # The package's own reader lists a folder and parses file names; the layout is fixed, so paths are built
    # instead.
    root = Path(easy_vqa.__file__).parent / "data" / split
    questions = root / "questions.json"
    advice = "Reinstall it: pip install --force-reinstall easy-vqa==1.0"
    try:
        rows = json.loads(questions.read_text(encoding="utf-8"))
        # one path for each image, shared by its questions
        images = {entry.name: entry for entry in (root / "images").iterdir()}
    except (OSError, ValueError) as error:
        raise DataError(f"The installed package easy-vqa is damaged: {error}. {advice}") from error
    samples = []
    for number, row in enumerate(rows):
        if not (
            isinstance(row, list)
            and len(row) == 3
            and isinstance(row[0], str)
            and isinstance(row[1], str)
            and f"{row[2]}.png" in images
        ):
            raise DataError(
                f"The installed package easy-vqa is damaged: row {number} of {questions} is {row!r}, "
                "expected "
                f"[question, answer, number of an image in {root / 'images'}]. {advice}"
            )
        question, answer, image = row
        samples.append(
            Sample(
                id=f"easy-vqa/{split}/{number:05d}",
                image=images[f"{image}.png"],
                question=question,
                answer=answer,
            )
        )
    return Dataset("easy-vqa", split, tuple(samples))
