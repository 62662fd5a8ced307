"""Adapters on disk: ``adapter.safetensors`` and ``adapter.json`` in a folder.

The JSON names the adapter, its options, the seed, the sites and the fingerprint; the tensors are the trained leaves
and the shipped bases. Seeded bases are not stored: they follow from the seed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fednano.adapters.adapter_set import AdapterSet
from fednano.adapters.attach import attach
from fednano.adapters.protocol import Adapter, Basis, Tensors
from fednano.adapters.registry import create
from fednano.errors import FednanoError, ModelError

__all__ = ["Checkpoint", "attach_checkpoint", "load_checkpoint", "read_checkpoint", "save_checkpoint"]

FORMAT = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What `read_checkpoint` found.

    Attributes:
        adapter: the parametrisation.
        seed: the run's seed.
        sites: per site name, ``[kind, d_out, d_in]``.
        fingerprint: of the whole set, see `AdapterSet.fingerprint`.
        shared: shared leaves by wire name.
        personal: personal leaves by wire name; empty unless they were saved.
        bases: shipped bases per site.
    """

    adapter: Adapter
    seed: int
    sites: dict[str, list[Any]]
    fingerprint: str
    shared: Tensors
    personal: Tensors
    bases: dict[str, Tensors]


def save_checkpoint(folder: str | Path, adapters: AdapterSet, *, personal: bool = False) -> None:
    """Write a set of layers that all carry the same adapter.

    Args:
        folder: created if needed; files of an earlier checkpoint are replaced.
        adapters: the set.
        personal: whether personal leaves are written too: for the client's own disk only.

    Raises:
        ModelError: the sites carry different adapters.
    """
    specs = {layer.adapter.spec for layer in adapters.layers.values()}
    if len(specs) != 1:
        raise ModelError(f"a checkpoint holds one adapter; got {len(specs)}: {', '.join(sorted(specs))}")
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    tensors = {f"shared/{name}": value for name, value in adapters.travelling().items()}
    if personal:
        tensors |= {f"personal/{name}": value for name, value in adapters.personal().items()}
    for site, basis in adapters.export_basis().items():
        tensors |= {f"basis/{site}/{name}": value for name, value in basis.items()}
    options = json.loads(specs.pop())
    description = {
        "format": FORMAT,
        "adapter": options.pop("adapter"),
        "options": options,
        "seed": adapters.seed,
        "sites": {site.name: [site.kind, site.d_out, site.d_in] for site in adapters.sites()},
        "fingerprint": adapters.fingerprint(),
    }
    save_file({name: value.contiguous() for name, value in tensors.items()}, where / TENSORS)
    (where / DESCRIPTION).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a checkpoint without a model.

    Raises:
        ModelError: a file is missing, damaged, or of a format that this version does not know.
    """
    where = Path(folder)
    try:
        found = json.loads((where / DESCRIPTION).read_text())
        tensors = load_file(where / TENSORS)
    except FileNotFoundError as error:
        raise ModelError(
            f"{where}: {Path(str(error.filename)).name} is missing; expected a folder with {TENSORS} and {DESCRIPTION}"
        ) from error
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ModelError(
            f"{where}: the checkpoint is damaged ({error}); restore it or train again"
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        version = found.get("format") if isinstance(found, dict) else None
        raise ModelError(f"{where}: got checkpoint format {version!r}; this version reads format {FORMAT}")
    missing = {"adapter", "options", "seed", "sites", "fingerprint"} - set(found)
    if missing:
        raise ModelError(f"{where / DESCRIPTION}: missing {sorted(missing)}; the checkpoint is damaged")
    parts: dict[str, dict[str, Tensor]] = {"shared": {}, "personal": {}, "basis": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        if part not in parts:
            raise ModelError(f"{where / TENSORS}: unknown tensor {name!r}; the checkpoint is damaged")
        parts[part][rest] = value
    bases: dict[str, Tensors] = {}
    for name, value in parts["basis"].items():
        site, _, leaf = name.rpartition("/")
        bases.setdefault(site, {})[leaf] = value
    adapter = create(found["adapter"], **found["options"])
    return Checkpoint(
        adapter,
        found["seed"],
        found["sites"],
        found["fingerprint"],
        parts["shared"],
        parts["personal"],
        bases,
    )


def load_checkpoint(folder: str | Path, adapters: AdapterSet) -> None:
    """Load a checkpoint into layers that exist already.

    Raises:
        ModelError: the checkpoint is for another model (sites or shapes), another adapter or rank, or another basis.
    """
    saved = read_checkpoint(folder)
    mine = {site.name: [site.kind, site.d_out, site.d_in] for site in adapters.sites()}
    if mine != saved.sites:
        odd = sorted(name for name in set(mine) | set(saved.sites) if mine.get(name) != saved.sites.get(name))
        raise ModelError(
            f"{folder}: the checkpoint is for another model: site {odd[0]!r} is "
            f"{saved.sites.get(odd[0], 'absent')} there and "
            f"{mine.get(odd[0], 'absent')} here ({len(odd)} sites differ)"
        )
    for layer in adapters.layers.values():
        if layer.adapter.spec != saved.adapter.spec:
            raise ModelError(
                f"{folder}: the checkpoint holds adapter {saved.adapter.spec}; site {layer.site.name!r} carries "
                f"{layer.adapter.spec}. "
                "Create the adapter with the checkpoint's options"
            )
    if saved.adapter.basis in (Basis.WEIGHT, Basis.STATS):
        adapters.load_basis(saved.bases, saved.fingerprint)
    elif saved.fingerprint != adapters.fingerprint():
        raise ModelError(
            f"{folder}: the checkpoint was trained on basis {saved.fingerprint} with seed {saved.seed}, this model "
            "has basis "
            f"{adapters.fingerprint()} with seed {adapters.seed}; attach with seed={saved.seed}"
        )
    adapters.load_travelling(saved.shared)
    if saved.personal:
        adapters.load_personal(saved.personal)


def attach_checkpoint(model: nn.Module, folder: str | Path) -> AdapterSet:
    """Attach the adapter of a checkpoint to a fresh model and load it.

    Raises:
        ModelError: the model lacks a site, or a site has another shape; the model is left as it was.
    """
    saved = read_checkpoint(folder)
    bases = saved.bases if saved.adapter.basis in (Basis.WEIGHT, Basis.STATS) else None
    _require_sites(model, folder, saved.sites)
    adapters = attach(model, saved.adapter, list(saved.sites), seed=saved.seed, bases=bases)
    try:
        load_checkpoint(folder, adapters)
    except FednanoError:
        adapters.detach()
        raise
    return adapters


def _require_sites(model: nn.Module, folder: str | Path, sites: Mapping[str, list[Any]]) -> None:
    present = dict(model.named_modules())
    missing = [name for name in sites if name not in present]
    if missing:
        raise ModelError(
            f"{folder}: the checkpoint is for another model: {len(missing)} of its {len(sites)} sites do not exist "
            "here, such as "
            f"{missing[0]!r}"
        )
