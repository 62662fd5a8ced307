"""The words of the tiny model, its tokenizer and its processor.

The model is a word-level one: a word is a token, and so is every answer. The list holds every word of easy-VQA (so
that a tuned model can be asked about it) next to the words of the pretraining questions, and people, relations and
values for made-up facts.
"""

from __future__ import annotations

from typing import Final

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

__all__ = [
    "COLOURS",
    "IMAGE_SIZE",
    "MAX_TOKENS",
    "NAMES",
    "PATCH_SIZE",
    "RELATIONS",
    "SHAPES",
    "WORDS",
    "build_processor",
    "build_tokenizer",
]

IMAGE_SIZE: Final = 64
PATCH_SIZE: Final = 16
MAX_TOKENS: Final = 256

COLOURS: Final = (
    "red", "green", "blue", "yellow", "teal", "brown",
    "gray", "black", "white", "orange", "purple", "pink",
)  # fmt: skip
SHAPES: Final = (
    "circle", "rectangle", "triangle", "square", "diamond",
    "star", "cross", "ring", "moon", "arrow",
)  # fmt: skip
NAMES: Final = (
    "ada", "ben", "cora", "dan", "emma", "finn", "gina", "hugo", "iris", "jack", "kira", "leo", "mia", "noah",
    "olga", "paul", "rosa", "sam", "tina", "vera",
)  # fmt: skip
RELATIONS: Final[dict[str, tuple[str, ...]]] = {
    "city": ("paris", "rome", "oslo", "cairo", "lima", "tokyo", "delhi", "boston"),
    "pet": ("cat", "dog", "horse", "rabbit", "parrot", "turtle", "goat", "fish"),
    "job": ("doctor", "baker", "pilot", "teacher", "farmer", "nurse", "judge", "singer"),
    "fruit": ("apple", "pear", "plum", "cherry", "lemon", "grape", "melon", "fig"),
    "drink": ("tea", "coffee", "milk", "water", "juice", "cocoa", "wine", "soda"),
}
_COUNTS: Final = ("one", "two", "three")
_PLACES: Final = ("left", "right", "top", "bottom")
# Words of easy-VQA's sentences that are neither a colour nor a shape.
_EASY_VQA: Final = (
    "?", "a", "color", "contain", "does", "image", "in", "is", "no", "not", "of", "present", "shape", "the", "there",
    "what", "yes",
)  # fmt: skip
_GLUE: Final = (
    ":", ".", ",", "question", "answer", "absent", "an", "and", "any", "are", "as", "at", "be", "can", "count",
    "describe", "do", "drawn", "find", "for", "form", "found", "free", "from", "has", "have", "here", "how", "it",
    "kind", "know", "many", "me", "missing", "name", "near", "number", "object", "objects", "on", "only", "or",
    "paint", "painted", "part", "people", "picture", "place", "say", "scene", "see", "show", "side", "sits",
    "tell", "that", "these", "thing", "this", "to", "true", "us", "visible", "where", "which", "with", "without",
    "you",
)  # fmt: skip
_SPECIAL: Final = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")


def _words() -> tuple[str, ...]:
    groups = (_SPECIAL, _EASY_VQA, _GLUE, COLOURS, SHAPES, _COUNTS, _PLACES, NAMES, tuple(RELATIONS))
    values = tuple(word for group in RELATIONS.values() for word in group)
    words = tuple(word for group in groups for word in group) + values
    return tuple(dict.fromkeys(words))  # first mention wins, so that no word has two ids


WORDS: Final = _words()

# One turn with a picture reads "<bos><image> question : is it red ? answer :", and the model adds "yes <eos>".
_CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}"
    "{% set images, text = 0, message['content'] %}"
    "{% else %}"
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% endif %}"
    "{{ '<image>' * images }}"
    "{% if message['role'] == 'assistant' %} answer : {{ text }} {{ eos_token }}"
    "{% else %} question : {{ text }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} answer :{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer, with the chat template that says how a prompt is written.

    It lower-cases, splits at blanks and punctuation, pads on the left and adds nothing by itself: ``<bos>`` comes from
    the chat template.
    """
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=MAX_TOKENS,
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    return wrapped


def build_processor() -> LlavaProcessor:
    """Tokenizer and image processor in one, as LLaVA has them; works with Pillow alone, without torchvision."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = LlavaImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )
