"""All adapters of a model as one object: what travels, the shipped bases, counts, merging."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fednano.adapters.layer import AdapterLayer
from fednano.adapters.protocol import Adapter, Basis, Leaf, Role, Site, Tensors
from fednano.errors import ModelError, UpdateRefused

__all__ = ["AdapterSet", "Plan", "plan", "wire_leaves"]


def _wire_name(site: Site, leaf: str, metadata: Leaf) -> str:
    return f"group:{site.group}/{leaf}" if metadata.scope == "group" and site.group else f"{site.name}/{leaf}"


def wire_leaves(adapter: Adapter, sites: Iterable[Site], role: Role = "shared") -> dict[str, Leaf]:
    """Metadata of all trainable leaves of one role under the names they travel by; a group's leaves appear once.

    Names are ``<site>/<leaf>`` and ``group:<group>/<leaf>``.
    """
    return {
        _wire_name(site, name, leaf): leaf
        for site in sites
        for name, leaf in adapter.leaves(site).items()
        if leaf.role == role
    }


@dataclass(frozen=True)
class Plan:
    """What an adapter costs, from metadata alone.

    Attributes:
        sites: number of sites.
        parameters: trainable numbers, shared and personal.
        uplink_bytes: one client's update.
        basis_bytes: what is shipped down once: zero for seeded bases.
    """

    sites: int
    parameters: int
    uplink_bytes: int
    basis_bytes: int


def plan(adapter: Adapter, sites: Sequence[Site]) -> Plan:
    """Count parameters and bytes before anything is allocated.

    Args:
        adapter: the parametrisation.
        sites: from `sites_of`, which also works on the meta device, and `group_sites`.
    """
    shared, personal = wire_leaves(adapter, sites), wire_leaves(adapter, sites, "personal")
    shipped = adapter.basis in (Basis.WEIGHT, Basis.STATS)
    return Plan(
        sites=len(sites),
        parameters=sum(leaf.numel for leaf in (*shared.values(), *personal.values())),
        uplink_bytes=sum(leaf.nbytes for leaf in shared.values()),
        basis_bytes=sum(leaf.nbytes for site in sites for leaf in adapter.frozen(site).values())
        if shipped
        else 0,
    )


class AdapterSet:
    """The adapter layers of a model, or several bridges.

    Args:
        layers: by site name.
        seed: the run's seed.
        places: where each layer was put: parent, child name, layer; empty if nothing was replaced.
        flags: parameters of the model and whether they took gradients before.
    """

    def __init__(
        self,
        layers: Mapping[str, AdapterLayer],
        *,
        seed: int,
        places: Sequence[tuple[nn.Module, str, AdapterLayer]] = (),
        flags: Mapping[nn.Parameter, bool] | None = None,
    ) -> None:
        self.layers, self.seed = dict(layers), seed
        self._places, self._flags = list(places), dict(flags or {})

    def _named(self, role: Role) -> dict[str, tuple[AdapterLayer, str]]:
        return {
            _wire_name(layer.site, name, leaf): (layer, name)
            for layer in self.layers.values()
            for name, leaf in layer.leaves().items()
            if leaf.role == role
        }

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters, each once."""
        return list(
            {id(value): value for layer in self.layers.values() for value in layer.theta.values()}.values()
        )

    def sites(self) -> list[Site]:
        """Sites in order."""
        return [layer.site for layer in self.layers.values()]

    def parameter_count(self) -> int:
        """Trainable numbers, a group's leaves once."""
        return sum(
            layer.leaves()[name].numel
            for role in ("shared", "personal")
            for layer, name in self._named(role).values()
        )

    def uplink_bytes(self) -> int:
        """Bytes of one update."""
        return sum(layer.leaves()[name].nbytes for layer, name in self._named("shared").values())

    def travelling(self) -> Tensors:
        """Detached copies of the shared leaves, by wire name."""
        return {
            wire: layer.theta[name].detach().clone() for wire, (layer, name) in self._named("shared").items()
        }

    def personal(self) -> Tensors:
        """Detached copies of the personal leaves: for the client's own checkpoint, never for the wire."""
        return {
            wire: layer.theta[name].detach().clone()
            for wire, (layer, name) in self._named("personal").items()
        }

    def load_travelling(self, leaves: Mapping[str, Tensor]) -> None:
        """Copy shared leaves in; nothing is changed if anything is wrong.

        Raises:
            ModelError: names, shapes or values do not fit; see `AdapterLayer.load_travelling`.
        """
        self._load(leaves, "shared")

    def load_personal(self, leaves: Mapping[str, Tensor]) -> None:
        """Copy personal leaves in, see `load_travelling`."""
        self._load(leaves, "personal")

    def _load(self, leaves: Mapping[str, Tensor], role: Role) -> None:
        expected = self._named(role)
        missing, unknown = sorted(set(expected) - set(leaves)), sorted(set(leaves) - set(expected))
        if missing or unknown:
            raise ModelError(
                f"the adapter's leaves do not fit this model: missing {missing[:3]}{'...' if missing[3:] else ''}, "
                "unknown "
                f"{unknown[:3]}{'...' if unknown[3:] else ''}. Attach the same adapter to the same sites first"
            )
        for wire, (layer, name) in expected.items():
            layer.check_leaf(name, leaves[wire])
        with torch.no_grad():
            for wire, (layer, name) in expected.items():
                layer.theta[name].copy_(leaves[wire])

    def fingerprint(self) -> str:
        """Hex sha256 over the sites' fingerprints."""
        digest = hashlib.sha256()
        for name in sorted(self.layers):
            digest.update(f"{name}={self.layers[name].fingerprint()}\n".encode())
        return digest.hexdigest()

    def require_fingerprint(self, got: str) -> None:
        """Raise UpdateRefused, naming both fingerprints, unless ``got`` is this set's."""
        mine = self.fingerprint()
        if got != mine:
            raise UpdateRefused(
                f"the update was trained on basis {got}, this model has basis {mine}; fetch the server's basis and "
                "train again"
            )

    def export_basis(self) -> dict[str, Tensors]:
        """Per site, the frozen leaves that must be shipped; sites without any are left out."""
        exported = {name: layer.export_basis() for name, layer in self.layers.items()}
        return {name: basis for name, basis in exported.items() if basis}

    def load_basis(self, bases: Mapping[str, Mapping[str, Tensor]], fingerprint: str | None = None) -> None:
        """Replace bases by shipped ones.

        Args:
            bases: as `export_basis` gave them.
            fingerprint: the sender's `fingerprint`; checked afterwards if given.

        Raises:
            ModelError: an unknown site, a basis that does not fit, or another fingerprint than promised (both are
                named).
        """
        for name in bases:
            if name not in self.layers:
                raise ModelError(
                    f"got a basis for site {name!r}; this model's sites: {', '.join(self.layers)}"
                )
        for name, basis in bases.items():
            self.layers[name].load_basis(basis)
        if fingerprint is not None and fingerprint != (mine := self.fingerprint()):
            raise ModelError(
                f"after loading the shipped basis this model has fingerprint {mine}, expected {fingerprint}; it "
                "was changed on the "
                "way, or the adapter or its seed differ"
            )

    def merge(self) -> None:
        """Fold every change into its weight; if one cannot, none is."""
        done: list[AdapterLayer] = []
        try:
            for layer in self.layers.values():
                layer.merge()
                done.append(layer)
        except ModelError:
            for layer in done:
                layer.unmerge()
            raise

    def unmerge(self) -> None:
        """Put every saved weight back, bit for bit."""
        for layer in self.layers.values():
            layer.unmerge()

    def resize(self, rank: int) -> None:
        """Change the rank everywhere. Optimisers must be rebuilt."""
        for layer in self.layers.values():
            layer.resize(rank)

    def bare(self, inside: bool) -> None:
        """Take the layers out of the model (``inside=False``) or put them back, without touching their state."""
        for parent, child, layer in self._places:
            parent._modules[child] = layer if inside else layer.base

    def joined(self, other: AdapterSet) -> AdapterSet:
        """This set and another of the same model as one; the first set's flags win, since it was attached first."""
        return AdapterSet(
            {**self.layers, **other.layers},
            seed=self.seed,
            places=[*self._places, *other._places],
            flags={**other._flags, **self._flags},
        )

    def detach(self) -> None:
        """Put the original modules back: same objects, same weights, same requires_grad flags."""
        for layer in self.layers.values():
            layer.release()
        self.bare(inside=False)
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._places = []
