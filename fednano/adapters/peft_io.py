"""Interchange with PEFT: checkpoint folders in its LoRA format, without importing it.

LoRA, FFA and the linear NanoAdapter are written as they are. Any other mergeable adapter is written as the LoRA
nearest to its change, by truncated SVD per site, with the error reported. PEFT's SHiRA and RandLoRA checkpoints
cannot hold ours: the first does not store its positions, the second sums in another order.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fednano.adapters import bases
from fednano.adapters.adapter_set import AdapterSet
from fednano.adapters.attach import attach
from fednano.adapters.layer import AdapterLayer
from fednano.adapters.lora import FFA, LoRA
from fednano.adapters.nano import NanoAdapter
from fednano.errors import ModelError

__all__ = ["ExportedSite", "export_merged", "export_peft", "import_peft", "lora_factors", "write_lora"]

_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


@dataclasses.dataclass(frozen=True)
class ExportedSite:
    """One line of an export's report.

    Attributes:
        site: its name.
        rank: rank of the exported LoRA.
        error: relative Frobenius error of the exported change; 0 where the factors were copied.
    """

    site: str
    rank: int
    error: float

    def __str__(self) -> str:
        how = "exact" if self.error == 0 else f"relative error {self.error:.3g}"
        return f"{self.site}: LoRA rank {self.rank}, {how}"


def lora_factors(layer: AdapterLayer, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
    """The layer's change as ``B A``.

    Args:
        layer: of a mergeable adapter.
        rank: of the factors; None copies those that the adapter has, if it has any.

    Returns:
        ``A`` ``(r, d_in)``, ``B`` ``(d_out, r)`` with the scale in it, and the relative Frobenius error, 0 for copies.
    """
    adapter, both = layer.adapter, {**layer.theta, **layer.basis}
    if isinstance(adapter, LoRA | FFA) and rank is None:
        return both["A"].detach(), adapter.scale * both["B"].detach(), 0.0
    if isinstance(adapter, NanoAdapter) and adapter.act == "linear" and rank is None:
        return both["A"].detach().T, adapter.scale * both["B"].detach().T, 0.0
    change = layer.delta().detach().double().cpu()
    size = rank or min(getattr(adapter, "rank", 16), *change.shape)
    u, s, v = bases.top_svd(change, min(size, *change.shape))
    root = s.clamp_min(0).sqrt()
    a, b = (root[:, None] * v.T).float(), (u * root).float()
    norm = float(change.norm())
    error = float((b.double() @ a.double() - change).norm()) / norm if norm else 0.0
    return a, b, error


def export_peft(
    folder: str | Path,
    adapters: AdapterSet,
    *,
    rank: int | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    prefix: str = "",
) -> list[ExportedSite]:
    """Write a folder that ``PeftModel.from_pretrained(model, folder)`` loads.

    Args:
        folder: created if needed.
        adapters: layers at linear, conv2d or embedding sites.
        rank: rank of the exported LoRA; None keeps the adapter's own and copies factors where there are any.
        base_model: name written into the configuration.
        task_type: PEFT's task, such as ``CAUSAL_LM``.
        prefix: dotted prefix that the sites have in the target model and not here.

    Returns:
        The error of every site, for printing.

    Raises:
        ModelError: a bridge (the target model has no module there), a grouped convolution, or a change that is not
            one matrix.
    """
    factors: dict[str, tuple[str, Tensor, Tensor]] = {}
    report: list[ExportedSite] = []
    for name, layer in adapters.layers.items():
        _require_exportable(layer)
        a, b, error = lora_factors(layer, rank)
        report.append(ExportedSite(name, len(a), error))
        if layer.site.kind == "conv2d":
            a, b = a.reshape(len(a), -1, *layer.site.kernel), b[:, :, None, None]
        factors[prefix + name] = (layer.site.kind, a, b)
    write_lora(folder, factors, base_model=base_model, task_type=task_type)
    return report


def write_lora(
    folder: str | Path,
    factors: Mapping[str, tuple[str, Tensor, Tensor]],
    *,
    biases: Mapping[str, Tensor] | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write a PEFT LoRA checkpoint whose scaling is 1.

    Args:
        folder: created if needed.
        factors: module name to its kind (``"linear"``, ``"conv2d"``, ``"embedding"``), ``A`` ``(r, ...)`` and
            ``B`` ``(d_out, r, ...)`` in the layout that PEFT gives that kind.
        biases: module name to the bias ``(d_out,)`` that replaces the module's own.
        base_model: name written into the configuration.
        task_type: PEFT's task, such as ``CAUSAL_LM``.
    """
    tensors: dict[str, Tensor] = {}
    for name, (kind, a, b) in factors.items():
        embedding = kind == "embedding"
        tensors[f"{_PREFIX}{name}.{'lora_embedding_A' if embedding else 'lora_A.weight'}"] = a
        tensors[f"{_PREFIX}{name}.{'lora_embedding_B' if embedding else 'lora_B.weight'}"] = b
    for name, bias in (biases or {}).items():
        tensors[f"{_PREFIX}{name}.base_layer.bias"] = bias
    ranks = {name: len(a) for name, (_, a, _) in factors.items()}
    largest = max(ranks.values())
    other = {f"^{name.replace('.', chr(92) + '.')}$": r for name, r in ranks.items() if r != largest}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "target_modules": sorted(ranks),
        "r": largest,
        "lora_alpha": largest,  # the scale is in B, so alpha / r is 1
        "rank_pattern": other,
        "alpha_pattern": other,
        "lora_dropout": 0.0,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    contents = {name: value.cpu().float().contiguous() for name, value in tensors.items()}
    save_file(contents, where / _WEIGHTS, metadata={"format": "pt"})
    (where / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _require_exportable(layer: AdapterLayer) -> None:
    site = layer.site
    if layer.base is None:
        raise ModelError(
            f"{site.kind} site {site.name!r} has no module in the base model, so PEFT cannot hold it; save it with "
            "save_checkpoint"
        )
    if site.groups != 1:
        raise ModelError(
            f"conv2d site {site.name!r} has {site.groups} groups, which PEFT's LoRA does not cover; use export_merged"
        )
    if layer.adapter.replaces_base or not layer.adapter.mergeable:
        raise ModelError(
            f"adapter {layer.adapter.name!r} at site {site.name!r} is not an additive matrix and has no LoRA form; "
            f"{'use export_merged' if layer.adapter.mergeable else 'save it with save_checkpoint'}"
        )


def import_peft(model: nn.Module, folder: str | Path, *, seed: int = 0, prefix: str = "") -> AdapterSet:
    """Attach the LoRA of a PEFT checkpoint.

    Args:
        model: the base model, without adapters.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        seed: of the set, for what is drawn later.
        prefix: dotted prefix that the checkpoint's names have and the model's have not.

    Raises:
        ModelError: not a LoRA, or a feature with no counterpart here (DoRA, trained biases or modules, a site of
            another shape).
    """
    where = Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (where / name).is_file():
            raise ModelError(
                f"{where}: {name} is missing; expected a PEFT checkpoint with {_CONFIG} and {_WEIGHTS}"
            )
    config = json.loads((where / _CONFIG).read_text())
    _require_plain(where, config)
    found = _by_site(where, prefix)
    layers: AdapterSet | None = None
    for name, (a, b) in found.items():
        module = dict(model.named_modules()).get(name)
        if module is None:
            if layers is not None:
                layers.detach()
            raise ModelError(
                f"{where}: the checkpoint is for another model: site {name!r} does not exist here"
            )
        alpha = _pattern(config.get("alpha_pattern"), prefix + name, config["lora_alpha"])
        adapter = LoRA(
            rank=len(a),
            alpha=float(alpha),
            rslora=bool(config.get("use_rslora")),
            dropout=0.0 if isinstance(module, nn.Embedding) else float(config.get("lora_dropout") or 0.0),
        )
        try:
            more = attach(model, adapter, name, seed=seed)
            layers = more if layers is None else layers.joined(more)
            more.layers[name].load_travelling({"A": a.flatten(1), "B": b.flatten(1)})
        except ModelError as error:
            if layers is not None:
                layers.detach()
            raise ModelError(f"{where}: {error}") from error
    if layers is None:
        raise ModelError(f"{where / _WEIGHTS}: no LoRA tensors under {_PREFIX + prefix!r}; check prefix")
    return layers


def _require_plain(where: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{where}: got peft_type={config.get('peft_type')!r}; only 'LORA' checkpoints can be imported"
        )
    refused = {
        "use_dora": bool(config.get("use_dora")),
        "bias": config.get("bias", "none") != "none",
        "lora_bias": bool(config.get("lora_bias")),
        "modules_to_save": bool(config.get("modules_to_save")),
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "layer_replication": bool(config.get("layer_replication")),
        "trainable_token_indices": bool(config.get("trainable_token_indices")),
        "target_parameters": bool(config.get("target_parameters")),
    }
    used = [f"{name}={config[name]!r}" for name, bad in refused.items() if bad]
    if used:
        raise ModelError(
            f"{where}: the checkpoint uses {', '.join(used)}, which has no counterpart here; merge it with PEFT first"
        )


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the whole name or its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _by_site(where: Path, prefix: str) -> dict[str, tuple[Tensor, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(where / _WEIGHTS).items():
        for suffix, half in _SUFFIXES.items():
            if name.startswith(_PREFIX + prefix) and name.endswith(suffix):
                halves.setdefault(name[len(_PREFIX + prefix) : -len(suffix)], {})[half] = value
                break
        else:
            raise ModelError(
                f"{where / _WEIGHTS}: tensor {name!r} is no LoRA factor under {_PREFIX + prefix!r}"
            )
    for site, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise ModelError(
                f"{where / _WEIGHTS}: site {site!r} has only factor {'/'.join(pair)}; the checkpoint is damaged"
            )
    return {site: (pair["A"], pair["B"]) for site, pair in halves.items()}


_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}


def export_merged(folder: str | Path, model: nn.Module, adapters: AdapterSet) -> None:
    """Write the model with every change folded in; the model in memory is as before afterwards.

    Args:
        folder: created if needed.
        model: the model that carries the adapters; a Hugging Face model is written by its ``save_pretrained``,
            another as ``model.safetensors``.
        adapters: what was attached to it.

    Raises:
        ModelError: a change is not one matrix, a site is a bridge, or its weight is tied to another module's.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    for name, layer in adapters.layers.items():
        if layer.base is None:
            raise ModelError(f"{layer.site.kind} site {name!r} has no module in the base model to merge into")
        tied = owners.get(layer.base.weight.data_ptr(), []) if isinstance(layer.base.weight, Tensor) else []
        others = [owner for owner in tied if not owner.startswith(name + ".")]
        if others:
            raise ModelError(
                f"site {name!r}: its weight is tied to {others[0]!r}, and a merged export would untie them only "
                "until the model is loaded "
                "again; set tie_word_embeddings=False and copy the weight, or leave this site out"
            )
    adapters.merge()
    adapters.bare(inside=False)
    try:
        where = Path(folder)
        save = getattr(model, "save_pretrained", None)
        if callable(save):
            save(where)
        else:
            where.mkdir(parents=True, exist_ok=True)
            tensors = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
            save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    finally:
        adapters.bare(inside=True)
        adapters.unmerge()
