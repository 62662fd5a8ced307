"""`fednano export`: what a run has tuned, in the formats that other tools read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fednano.adapters import ExportedSite, write_lora
from fednano.errors import ConfigError, ModelError
from fednano.exporting.bridge import changes
from fednano.exporting.card import model_card
from fednano.federation.answer import tuned_edge
from fednano.federation.enrolled import auditor_of
from fednano.models.edge import NanoEdge
from fednano.models.files import find_model
from fednano.models.load import load_whole
from fednano.runs import RunFolder

__all__ = ["FORMATS", "Export", "export_run"]


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where.
        kind: one of `FORMATS`.
        sites: for ``peft``, rank and error of each changed module.
    """

    folder: Path
    kind: str
    sites: tuple[ExportedSite, ...] = ()


_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)


@dataclass(frozen=True)
class _Job:
    """What every writer needs: where to, which run, its tuned edge, the model's name."""

    folder: Path
    run: RunFolder
    edge: NanoEdge
    model: str
    rank: int | None


def _whole(name: str) -> Any:
    model = load_whole(name)
    if not hasattr(model.config, "vision_config"):
        raise ModelError(
            f"{name!r} is text-only; its adapter can be exported with --format safetensors alone."
        )
    return model


def _peft(job: _Job) -> tuple[ExportedSite, ...]:
    found = list(changes(job.edge, _whole(job.model), rank=job.rank))
    factors = {
        change.name: ("embedding" if change.stream == "text" else "linear", *change.factors())
        for change in found
    }
    biases = {change.name: bias for change in found if (bias := change.bias()) is not None}
    write_lora(job.folder, factors, biases=biases, base_model=job.model)
    return tuple(ExportedSite(change.name, len(change.a), change.error) for change in found)


def _merged(job: _Job) -> tuple[ExportedSite, ...]:
    model = _whole(job.model)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is not None and head.weight is table and "text" in job.edge.layers:
        # The text adapter stands behind the table, not behind the head: from here on they differ.
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        head.weight = torch.nn.Parameter(table.detach().clone(), requires_grad=False)
    for change in changes(job.edge, model):
        change.merge()
    model.save_pretrained(job.folder)
    files = find_model(job.model)
    for name in _TEXT_FILES:
        source = files.file(name)
        if source is not None and not (job.folder / name).exists():
            shutil.copyfile(source, job.folder / name)
    return ()


def _safetensors(job: _Job) -> tuple[ExportedSite, ...]:
    for name in ("adapter.safetensors", "adapter.json"):
        shutil.copyfile(job.run.file(name), job.folder / name)
    return ()


_WRITERS: dict[str, Callable[[_Job], tuple[ExportedSite, ...]]] = {
    "peft": _peft,
    "merged": _merged,
    "safetensors": _safetensors,
}
FORMATS = tuple(_WRITERS)
"""``peft``: a LoRA checkpoint for ``PeftModel.from_pretrained``; ``merged``: the whole model with the change folded in;
``safetensors``: the adapter's own tensors with their description."""


def export_run(
    run: str,
    kind: str = "peft",
    *,
    out: Path | None = None,
    rank: int | None = None,
    runs_dir: Path = Path("runs"),
) -> Export:
    """Write a run's final adapter for other tools, with a model card.

    Args:
        run: a run's id or folder, or ``"latest"``.
        kind: one of `FORMATS`.
        out: folder to write; must not exist yet, or be empty. By default ``export/<format>`` in the run's folder.
        rank: for ``peft``: rank of the exported LoRA; ``None`` keeps the adapter's own.
        runs_dir: folder of the run folders.

    Raises:
        RunError: there is no such run, it has no final adapter, or its model has changed.
        ConfigError: unknown format, or the folder is in use.
        ModelError: the adapter has no such form.
    """
    if kind not in _WRITERS:
        raise ConfigError(f"unknown export format {kind!r}; expected one of {', '.join(FORMATS)}.")
    if rank is not None and (kind != "peft" or rank < 1):
        raise ConfigError(f"rank: got {rank}; expected at least 1, and only with format 'peft'.")
    folder = RunFolder.open(run, root=runs_dir)
    config, edge = tuned_edge(folder)
    if edge.beside and kind != "safetensors":
        raise ConfigError(
            f"run {folder.id} ended with a residual beside its adapters (rule {config.rule!r}), which format {kind!r} "
            "would leave out. Export 'safetensors', or tune with a rule that leaves none, such as 'flexlora'."
        )
    target = out if out is not None else folder.path / "export" / kind
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"the folder {target} is not empty. Choose another with --out, or remove it.")
    # Written beside its place and moved there whole: a half-written export never looks like a finished one.
    partial = target.parent / f".{target.name}.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        sites = _WRITERS[kind](_Job(partial, folder, edge, config.model, rank))
        (partial / "README.md").write_text(model_card(kind, config, _summary(folder), sites))
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except (OSError, ModelError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    auditor_of(config.to_mapping()).record("export", run=folder.id, format=kind, folder=str(target))
    return Export(target, kind, sites)


def _summary(folder: RunFolder) -> dict[str, Any]:
    """The run's summary; empty for a run that ended before it was written."""
    path = folder.file("summary.json")
    found = folder.read_json("summary.json") if path.exists() else {}
    return found if isinstance(found, dict) else {}
