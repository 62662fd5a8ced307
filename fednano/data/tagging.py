"""Named entities of tagged words."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["entities"]


def entities(words: Sequence[str], tags: Sequence[str]) -> list[tuple[str, str]]:
    """Tagged words as (type, words) pairs, in order.

    Tags in the BIO scheme (``B-PER I-PER O``) are joined to entities; others, such as parts of speech, stay one a word.

    Args:
        words: ``(n,)``.
        tags: ``(n,)``; ``O`` stands for none.
    """
    found: list[tuple[str, list[str]]] = []
    inside = ""
    for word, tag in zip(words, tags, strict=True):
        mark, dash, name = tag.partition("-")
        bio = bool(dash) and mark in ("B", "I")
        if bio and mark == "I" and inside == name:
            found[-1][1].append(word)
        elif tag not in ("O", ""):
            found.append((name if bio else tag, [word]))
        inside = name if bio else ""
    return [(kind, " ".join(parts)) for kind, parts in found]
