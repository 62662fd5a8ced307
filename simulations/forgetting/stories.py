"""stories260K as Hugging Face's Llama: a language model small enough to be trained and retrained in minutes.

The model and its tokenizer come as the two files of llama2.c (Karpathy, MIT), ``stories260K.bin`` and ``tok512.bin``.
The first is a header of seven int32 and then float32 tensors in a fixed order; the second a list of pieces with their
scores. Queries and keys are stored for rotations of neighbouring pairs, Hugging Face rotates halves: their rows are
brought into that order.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["BOS", "EOS", "stories_model", "stories_tokenizer", "write_model"]

BOS, EOS = 1, 2
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}{% else %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %} {{ text }}{{ eos_token }}{% else %}{{ text }}{% endif %}"
    "{% endfor %}"
)
_MODEL, _TOKENS = "stories260K.bin", "tok512.bin"


def stories_model(folder: Path, *, positions: int = 512) -> LlamaForCausalLM:
    """The model in float32, 260 thousand parameters, input and output embeddings tied.

    Args:
        folder: holds ``stories260K.bin``.
        positions: longest sequence that it is configured for; rotary positions have no weights.
    """
    content = (folder / _MODEL).read_bytes()
    width, inner, layers, heads, shared, words, trained = struct.unpack("<7i", content[:28])
    head, kv = width // heads, shared * (width // heads)
    numbers = torch.from_numpy(np.frombuffer(content, dtype="<f4", offset=28).copy())
    place = 0

    def take(*shape: int) -> Tensor:
        nonlocal place
        count = int(np.prod(shape))
        place += count
        return numbers[place - count : place].view(*shape)

    state = {"model.embed_tokens.weight": take(words, width)}
    for name, shape in (
        ("input_layernorm", (width,)),
        ("self_attn.q_proj", (width, width)),
        ("self_attn.k_proj", (kv, width)),
        ("self_attn.v_proj", (kv, width)),
        ("self_attn.o_proj", (width, width)),
        ("post_attention_layernorm", (width,)),
        ("mlp.gate_proj", (inner, width)),
        ("mlp.down_proj", (width, inner)),
        ("mlp.up_proj", (inner, width)),
    ):
        each = take(layers, *shape)
        for layer in range(layers):
            state[f"model.layers.{layer}.{name}.weight"] = each[layer]
    state["model.norm.weight"] = take(width)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for layer in range(layers):
        for name in ("q_proj", "k_proj"):
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            paired = state[key].view(-1, head // 2, 2, width)
            state[key] = paired.transpose(1, 2).reshape(-1, width)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=max(trained, positions),
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: value.clone() for name, value in state.items()})
    return model.float().eval()


def stories_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer: 512 pieces, byte-pair merges in the order of their scores, bytes for what has no piece.

    Args:
        folder: holds ``tok512.bin``.
    """
    content = (folder / _TOKENS).read_bytes()
    pieces: list[tuple[str, float]] = []
    place = 4
    while place < len(content):
        score, length = struct.unpack_from("<fi", content, place)
        piece = content[place + 8 : place + 8 + length].decode("utf-8", errors="replace")
        pieces.append((piece, score))
        place += 8 + length
    words = {}
    for number, (piece, _) in enumerate(pieces):
        if number < 3:
            name = ("<unk>", "<s>", "</s>")[number]
        elif number < 259:
            name = f"<0x{number - 3:02X}>"
        else:
            name = piece.replace(" ", "▁")
        words[name] = number
    scores = {piece.replace(" ", "▁"): score for piece, score in pieces[259:]}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                merges.append((-score, words[piece[:cut]], words[piece[cut:]], piece[:cut], piece[cut:]))
    tokenizer = Tokenizer(
        models.BPE(words, [(a, b) for *_, a, b in sorted(merges)], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def write_model(
    folder: Path, stories: Path, *, positions: int = 512, model: LlamaForCausalLM | None = None
) -> None:
    """Write a model folder that a run can tune against: weights, tokenizer, and a chat template without any words.

    Args:
        folder: where to.
        stories: holds the two files.
        positions: longest prompt with its answer.
        model: further trained; by default as it is published.
    """
    model = stories_model(stories, positions=positions) if model is None else model
    model.save_pretrained(folder)
    GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0, do_sample=False).save_pretrained(
        folder
    )
    tokenizer = stories_tokenizer(stories)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
