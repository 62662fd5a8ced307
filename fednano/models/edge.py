"""The client's side of the split: vision tower, connector, token embeddings, and the NanoAdapters behind them.

FedNano (arXiv:2506.14824) calls encoder, connector and adapters together *NanoEdge*. Only the adapters train. The
connector's output for an image therefore never changes, and is computed once (:mod:`fednano.training.features`).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fednano.adapters import Adapter, AdapterLayer, Site
from fednano.errors import ConfigError, DataError, ModelError
from fednano.models.factored import FactoredBatch, StreamFactors
from fednano.models.files import ModelFiles
from fednano.models.images import Images, ImageSpan
from fednano.models.prompt import ImagePlace, Prompt, build_prompt
from fednano.models.table import StoredTable, leave_on_disk
from fednano.models.vision import Unfold, Vision, token_blocks

__all__ = ["STREAMS", "Composed", "EdgePart", "NanoEdge"]

STREAMS = ("image", "text")
"""The two places where a NanoAdapter can stand: on the connector's output and on the token embeddings."""


_NUMBERED = WeakIdKeyDictionary()
"""A number for each tensor of features, for as long as it lives; no two ever have the same."""
_NUMBERS = itertools.count(1)
_PROMPTS = 65536  # tokenised texts kept; some tens of megabytes at most


class EdgePart(nn.Module):
    """Frozen parts that a client holds.

    Attributes:
        hidden_size: width ``d`` of the embeddings that go to the language model.
        vision: encoder and connector; ``None`` in a text-only model.
        place: how prompts mark an image; ``None`` in a text-only model.
        fingerprint: hex SHA-256 of the weights; features computed by equal edges are interchangeable.
    """

    def __init__(
        self,
        *,
        vision: Vision | None,
        token_embedding: nn.Module,
        tokenizer: Any,
        place: ImagePlace | None,
        hidden_size: int,
        fingerprint: str,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.token_embedding = token_embedding
        self.tokenizer = tokenizer
        self.place = place
        self.hidden_size = hidden_size
        self.fingerprint = fingerprint
        self._prompts: dict[tuple[object, ...], Prompt] = {}
        self._unfold: Unfold | None = None
        # Moves with the module, as a table that stays on disk does not.
        self._like: Tensor
        self.register_buffer("_like", next(token_embedding.parameters()).new_empty(0), persistent=False)
        self.requires_grad_(False)

    def leave_table(self, files: ModelFiles, wanted: Callable[[str], bool]) -> None:
        """Let go of the table of token embeddings where its rows can be read from the checkpoint: see
        `fednano.models.table.leave_on_disk`."""
        self.token_embedding = leave_on_disk(files, self.token_embedding, wanted)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that have an embedding."""
        return int(self.token_embedding.num_embeddings)  # type: ignore[arg-type]

    @property
    def image_token_id(self) -> int:
        """Id of the token that stands for an image's features in a prompt; -1 in a text-only model."""
        return -1 if self.place is None else self.place.token_id

    def preprocess(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """Images (PIL) to pixels, by the model's own image processor.

        Raises:
            ModelError: the model is text-only.
        """
        if self.vision is None:
            raise ModelError(
                "the model is text-only, but the data has images. Leave them out, or choose a multimodal model."
            )
        return self.vision.preprocess(images)

    def encode(self, pixels: Mapping[str, Tensor]) -> list[Tensor]:
        """Vision tower and connector: what `preprocess` gave, to the features of each image.

        Returns:
            for each image ``(image_tokens, d)``, or with more dimensions before d: see `fednano.models.vision`.
        """
        assert self.vision is not None
        return self.vision.encode(pixels)

    def unfold(self, ids: Sequence[int], features: Tensor) -> tuple[int, ...]:
        """A prompt's ids with one image token for each run of image tokens that ``features`` are made of."""
        if self._unfold is None:
            assert self.place is not None
            self._unfold = Unfold(self.tokenizer, self.place)
        return self._unfold(ids, features.shape)

    def prompt(
        self,
        question: str,
        answer: str | None,
        *,
        image: bool = True,
        history: Sequence[tuple[str, str]] = (),
    ) -> Prompt:
        """Token ids of one sample; see :func:`fednano.models.prompt.build_prompt`. Equal texts are tokenised once."""
        key = (question, answer, image, history)
        if key not in self._prompts:
            if len(self._prompts) >= _PROMPTS:
                self._prompts.clear()
            self._prompts[key] = build_prompt(
                self.tokenizer, self.place, question, answer, image=image, history=history
            )
        return self._prompts[key]

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids ``(...)``, on any device, to embeddings ``(..., d)`` on that of the edge."""
        stored = isinstance(self.token_embedding, StoredTable)
        embeddings: Tensor = self.token_embedding(ids if stored else ids.to(self._like.device))
        return embeddings.to(self._like)


@dataclass(frozen=True)
class Composed:
    """One batch as the language model wants it, with what is needed to find each stream in it.

    Attributes:
        embeds: ``(B, T, d)`` adapted embeddings.
        mask: ``(B, T)`` bool, true at real tokens.
        labels: ``(B, T)`` int64, -100 where nothing is to be predicted.
        raw: ``(B, T, d)`` the same embeddings before the adapters.
        streams: stream name to ``(B, T)`` bool: the positions it adapts.
        images: where each sample's images stand.
    """

    embeds: Tensor
    mask: Tensor
    labels: Tensor
    raw: Tensor
    streams: dict[str, Tensor]
    images: Images = ()


class NanoEdge(nn.Module):
    """Edge part plus one adapter per stream; the adapters hold the only trainable parameters.

    Args:
        edge: the frozen part.
        adapters: stream name (``"image"``, ``"text"``) to adapter. A stream without one passes unchanged.
        seed: seed of the adapters' frozen and initial leaves; the same on all clients of a run.
        stats: per stream, for adapters whose basis comes from gathered statistics.
        bases: per stream, a basis made elsewhere; then nothing is computed.

    Raises:
        ConfigError: no adapter at all, or a stream that does not exist (an image stream in a text-only model).
    """

    def __init__(
        self,
        edge: EdgePart,
        adapters: Mapping[str, Adapter],
        *,
        seed: int,
        stats: Mapping[str, Mapping[str, Tensor]] | None = None,
        bases: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        unknown = sorted(set(adapters) - set(STREAMS))
        if unknown or not adapters:
            raise ConfigError(
                f"adapters stand on the streams {unknown or 'none'}; expected some of {list(STREAMS)}."
            )
        if "image" in adapters and edge.vision is None:
            raise ConfigError("the model is text-only and has no stream 'image'; set streams to 'text'.")
        self.edge = edge
        self.layers = nn.ModuleDict(
            {
                stream: AdapterLayer(
                    adapter,
                    self.site(stream, edge.hidden_size),
                    seed=seed,
                    stats=(stats or {}).get(stream),
                    basis=(bases or {}).get(stream),
                )
                for stream, adapter in adapters.items()
            }
        )
        self.beside: dict[str, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def site(stream: str, hidden_size: int) -> Site:
        """The bridge site of a stream: between edge and language model, with no base weight of its own."""
        return Site(name=stream, kind="bridge", d_in=hidden_size, d_out=hidden_size)

    def layer(self, stream: str) -> AdapterLayer:
        """The adapter layer of a stream."""
        found = self.layers[stream]
        assert isinstance(found, AdapterLayer)
        return found

    def assemble(self, prompts: Sequence[Prompt], features: Sequence[Tensor | None]) -> Composed:
        """Put a batch together, before adaptation: right-padded, image features at their placeholders.

        Args:
            prompts: ``B`` tokenised samples.
            features: for each, its image's features (see `EdgePart.encode`), or ``None`` when it has no image.
        """
        rows = [self._row(prompt, feature) for prompt, feature in zip(prompts, features, strict=True)]
        length = max(row[0].shape[0] for row in rows)
        width, device = self.edge.hidden_size, rows[0][0].device
        raw = torch.zeros(len(rows), length, width, dtype=rows[0][0].dtype, device=device)
        mask = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
        labels = torch.full((len(rows), length), -100, dtype=torch.long, device=device)
        is_image = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
        for index, (row, label, spans) in enumerate(rows):
            size = row.shape[0]
            raw[index, :size], mask[index, :size] = row, True
            labels[index, :size] = label
            for span in spans:
                is_image[index, span.start : span.end] = True
        images = tuple(spans for _, _, spans in rows)
        return Composed(raw, mask, labels, raw, {"image": is_image, "text": mask & ~is_image}, images)

    def _row(self, prompt: Prompt, feature: Tensor | None) -> tuple[Tensor, Tensor, tuple[ImageSpan, ...]]:
        """One sample: embeddings ``(n, d)``, labels ``(n,)``, and where its images stand."""
        found = prompt.ids.count(self.edge.image_token_id)
        if found != int(feature is not None):
            raise DataError(
                f"a prompt has {found} image placeholders but {int(feature is not None)} images; they must agree."
            )
        before = prompt.ids if feature is None else self.edge.unfold(prompt.ids, feature)
        ids = torch.tensor(before + prompt.answer, dtype=torch.long)
        label = torch.full_like(ids, -100)
        if prompt.answer:
            label[len(before) :] = ids[len(before) :]
        if feature is None:
            return self.edge.embed(ids), label, ()
        places = [place for place, token in enumerate(before) if token == self.edge.image_token_id]
        row = self.edge.embed(ids.index_fill(0, torch.tensor(places), 0))  # it may have no row
        rows, labels, spans = [], [], []
        at = length = 0
        for place, (block, height, width) in zip(places, token_blocks(feature), strict=True):
            spans.append(ImageSpan(length + place - at, height, width))
            rows += [row[at:place], block.to(row)]
            labels += [label[at:place], label.new_full((len(block),), -100)]
            length, at = spans[-1].end, place + 1
        return torch.cat([*rows, row[at:]]), torch.cat([*labels, label[at:]]), tuple(spans)

    def forward(self, prompts: Sequence[Prompt], features: Sequence[Tensor | None]) -> Composed:
        """Assemble a batch and adapt each stream; differentiable in the adapters' leaves."""
        batch = self.assemble(prompts, features)
        embeds = batch.raw
        for stream in self.layers:
            where = batch.streams[stream]  # (B, T)
            if where.any():
                rows = batch.raw[where]  # (N, d): an adapter sees its own positions and nothing else
                embeds = embeds.masked_scatter(where.unsqueeze(-1), self._adapt(stream, rows))
        return Composed(embeds, batch.mask, batch.labels, batch.raw, batch.streams, batch.images)

    def factor(self, prompts: Sequence[Prompt], features: Sequence[Tensor | None]) -> FactoredBatch | None:
        """The batch of `forward` as frozen rows and low-rank parts; ``None`` if an adapter has no low-rank form."""
        batch = self.assemble(prompts, features)
        streams = []
        for stream in self.layers:
            where = batch.streams[stream]
            if not bool(where.any()):
                continue  # an up-projection without positions has no influence
            rows = batch.raw[where]
            found = self.layer(stream).factors(rows)
            if found is None:
                return None
            z, up = found
            if stream in self.beside:
                down, back = self.beside[stream]
                z, up = torch.cat([z, rows @ down], 1), torch.cat([up, back])
            streams.append(StreamFactors(where, z, up))
        names = tuple(map(self._name, prompts, features))
        return FactoredBatch(batch.raw, batch.mask, batch.labels, tuple(streams), batch.images, names)

    def _name(self, prompt: Prompt, feature: Tensor | None) -> Hashable:
        """Names a sample by its tokens and by the very tensor that holds its image's features."""
        number = None
        if feature is not None:
            if feature not in _NUMBERED:
                _NUMBERED[feature] = next(_NUMBERS)
            number = _NUMBERED[feature]
        return self.edge.fingerprint, prompt, number

    def embed_new(self, ids: Tensor) -> Tensor:
        """Embed generated tokens ``(B,)`` as training embeds answers: adapted like all text. Returns ``(B, d)``."""
        rows = self.edge.embed(ids)
        return self._adapt("text", rows) if "text" in self.layers else rows

    def _adapt(self, stream: str, rows: Tensor) -> Tensor:
        """Rows ``(N, d)`` behind a stream's adapter and, where a merge rule left one, its residual."""
        adapted: Tensor = self.layer(stream)(rows)
        if stream in self.beside:
            down, up = self.beside[stream]  # (d, q), (q, d)
            adapted = adapted + (rows @ down) @ up
        return adapted

    def parameter_count(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def travelling(self) -> dict[str, Tensor]:
        """Leaves that clients and server exchange, as ``"<stream>.<leaf>"``; detached copies."""
        return {
            f"{stream}.{leaf}": tensor
            for stream in self.layers
            for leaf, tensor in self.layer(stream).travelling().items()
        }

    def load_travelling(self, leaves: Mapping[str, Tensor]) -> None:
        """Take over leaves from :meth:`travelling`, and residuals that merge rules carry beside the frozen model.

        A residual is a pair of frozen factors, ``"beside/<stream>.down"`` ``(d, q)`` and ``"beside/<stream>.up"``
        ``(q, d)``; without them a stream has none.

        Raises:
            ConfigError: the leaves belong to another set of streams, or a residual does not fit.
        """
        by_stream: dict[str, dict[str, Tensor]] = {stream: {} for stream in self.layers}
        self.beside = self._residuals(leaves)
        for name, tensor in leaves.items():
            if name.startswith("beside/"):
                continue
            stream, _, leaf = name.partition(".")
            if stream not in by_stream:
                raise ConfigError(f"got a leaf {name!r}; this NanoEdge has the streams {sorted(by_stream)}.")
            by_stream[stream][leaf] = tensor
        for stream, group in by_stream.items():
            self.layer(stream).load_travelling(group)

    def _residuals(self, leaves: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        found = {name.removeprefix("beside/") for name in leaves if name.startswith("beside/")}
        pairs = {}
        for stream in sorted({name.rsplit(".", 1)[0] for name in found}):
            down, up = (leaves.get(f"beside/{stream}.{side}") for side in ("down", "up"))
            width = self.edge.hidden_size
            if stream not in self.layers or down is None or up is None:
                raise ConfigError(
                    f"got the residuals {sorted(found)}; expected down and up of {list(self.layers)}."
                )
            if down.shape[0] != width or up.shape[1:] != (width,) or down.shape[1] != up.shape[0]:
                raise ConfigError(
                    f"the residual of {stream} is {tuple(down.shape)} x {tuple(up.shape)}; expected ({width}, q) x "
                    f"(q, {width})."
                )
            device = next(self.layer(stream).parameters()).device
            pairs[stream] = (down.to(device), up.to(device))
        return pairs

    def spec(self) -> str:
        """The adapters' configuration in one line; updates of equal spec have equal leaves."""
        return "; ".join(f"{stream}: {self.layer(stream).adapter.spec}" for stream in sorted(self.layers))

    def basis_fingerprint(self) -> str:
        """One hash over the frozen bases of all streams."""
        joined = "|".join(f"{stream}:{self.layer(stream).fingerprint()}" for stream in sorted(self.layers))
        return hashlib.sha256(joined.encode()).hexdigest()
