"""From question and answer to token ids, by the model's own chat template.

Prompt ids and answer ids come from tokenising the whole text once, so that the boundary between them is the one the
tokenizer makes, whatever its rules for spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fednano.errors import ModelError
from fednano.models.files import ModelFiles

__all__ = ["ImagePlace", "Prompt", "build_prompt", "load_text_processor"]


@dataclass(frozen=True)
class ImagePlace:
    """How a model's prompts mark an image.

    Attributes:
        token_id: of the token that stands for image features.
        shown: what the chat template writes for an image.
        whole: what becomes of that, with one token for all of the features.
    """

    token_id: int
    shown: str
    whole: str


@dataclass(frozen=True)
class Prompt:
    """Token ids of one sample. The image stands as one placeholder id, or not at all.

    Attributes:
        ids: prompt tokens, with at most one image placeholder.
        answer: answer tokens with the end token; empty when only a prompt was asked for.
    """

    ids: tuple[int, ...]
    answer: tuple[int, ...]


def load_text_processor(files: ModelFiles) -> Any:
    """The model's tokenizer, with its chat template.

    Raises:
        ModelError: the model has no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(files.repository or str(files.folder))
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{files.name!r} has no usable tokenizer: {first}") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(files)
    return tokenizer


def _processor_template(files: ModelFiles) -> str | None:
    """LLaVA checkpoints keep their chat template with the processor, in one of two files."""
    import json

    path = files.file("chat_template.jinja")
    if path is not None:
        return path.read_text()
    path = files.file("chat_template.json")
    if path is not None:
        template: str | None = json.loads(path.read_text()).get("chat_template")
        return template
    return None


def _render(
    tokenizer: Any, question: str, image: bool, place: ImagePlace | None, history: Sequence[tuple[str, str]]
) -> str:
    messages: list[dict[str, Any]] = []
    for role, said in (*history, ("user", question)):
        content: list[dict[str, str]] | str = said  # templates of text-only models know nothing else
        if place is not None:
            first = image and role == "user" and not any(message["role"] == "user" for message in messages)
            # an image stands where the conversation begins
            content = [*([{"type": "image"}] if first else []), {"type": "text", "text": said}]
        messages.append({"role": role, "content": content})
    if tokenizer.chat_template is not None:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text
    # LLaVA-1.5's format, which checkpoints without a template were tuned on.
    marks = {"user": "USER: ", "assistant": "ASSISTANT: "}
    turns = [marks.get(role, "") + said for role, said in (*history, ("user", question))]
    if image:
        at = next(place for place, turn in enumerate(turns) if turn.startswith(marks["user"]))
        assert place is not None
        turns[at] = f"{marks['user']}{place.shown}\n{turns[at].removeprefix(marks['user'])}"
    return " ".join([*turns, "ASSISTANT:"])


def build_prompt(
    tokenizer: Any,
    place: ImagePlace | None,
    question: str,
    answer: str | None,
    *,
    image: bool = True,
    history: Sequence[tuple[str, str]] = (),
) -> Prompt:
    """Tokenise one sample.

    Args:
        tokenizer: the model's tokenizer.
        place: how prompts mark an image; ``None`` for a text-only model.
        question: the question, as text.
        answer: the answer to learn, or ``None`` for a prompt to generate from.
        image: whether the sample has an image.
        history: what was said before, as (role, text); part of the prompt, so nothing of it is learnt.

    Raises:
        ModelError: the template yields no placeholder (or several) for an image.
    """
    text = _render(tokenizer, question, image, place, history)
    if place is not None:
        text = text.replace(place.shown, place.whole)
    ids: list[int] = tokenizer(text, add_special_tokens=not _starts_with_bos(tokenizer, text))["input_ids"]
    token_id = place.token_id if place is not None else -1
    placeholders = ids.count(token_id)
    if placeholders != int(image):
        raise ModelError(
            f"the model's prompt for {question!r} has {placeholders} image placeholders (token id {token_id}); "
            f"expected {int(image)}. Questions must not contain the placeholder; else check the chat template."
        )
    if answer is None:
        return Prompt(tuple(ids), ())
    full_text = f"{text} {answer}" if not text.endswith((" ", "\n")) else f"{text}{answer}"
    full: list[int] = tokenizer(full_text, add_special_tokens=not _starts_with_bos(tokenizer, text))[
        "input_ids"
    ]
    ids, full = _without_eos(tokenizer, ids), _without_eos(tokenizer, full)
    shared = 0
    while shared < min(len(ids), len(full)) and ids[shared] == full[shared]:
        shared += 1
    answer_ids = full[shared:]
    if not answer_ids:
        raise ModelError(f"the answer {answer!r} has no tokens in this model's vocabulary.")
    if tokenizer.eos_token_id is not None:
        answer_ids.append(tokenizer.eos_token_id)
    return Prompt(tuple(full[:shared]), tuple(answer_ids))


def _starts_with_bos(tokenizer: Any, text: str) -> bool:
    """Templates may write the start token themselves; it must not stand there twice."""
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def _without_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
