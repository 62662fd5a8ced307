"""Put adapters into a model by site patterns, and take them out again.

A site's module is replaced by an `AdapterLayer` that holds it; nothing else of the model is touched, and
`AdapterSet.detach` puts the very same module objects back.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fednano.adapters.adapter_set import AdapterSet
from fednano.adapters.layer import AdapterLayer
from fednano.adapters.protocol import Adapter, Site
from fednano.errors import ModelError

__all__ = ["attach", "expand", "group_sites", "select", "sites_of"]


def expand(pattern: str) -> list[str]:
    """Expand braces: ``a.{q,v}_proj`` gives two patterns, ``layers.{0..2}.x`` three.

    Raises:
        ModelError: a brace is not closed.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        if "{" in pattern or "}" in pattern:
            raise ModelError(
                f"site pattern {pattern!r}: unbalanced braces; write for example 'layers.*.{{q,v}}_proj'"
            )
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    inside = [str(i) for i in range(int(span[1]), int(span[2]) + 1)] if span else match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [whole for choice in inside for whole in expand(head + choice.strip() + tail)]


def _regex(pattern: str) -> re.Pattern[str]:
    """``*`` matches within one dotted part, ``?`` one character of it, ``**`` any number of parts."""
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    wild = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts))


def _carriers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that can be replaced, by their first name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
    }


def select(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Names of the modules that match, in the model's order.

    Args:
        model: any module; may be on the meta device.
        patterns: dotted names with ``*`` (within one part), ``**`` (across parts), ``?`` and braces.

    Raises:
        ModelError: a pattern matches nothing that can carry an adapter; the message lists the nearest names.
    """
    carriers = _carriers(model)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for single in expand(pattern):
            regex = _regex(single)
            found = [name for name in carriers if regex.fullmatch(name)]
            if not found:
                raise ModelError(_nothing(model, single, regex, carriers))
            chosen.update(found)
    return [name for name in carriers if name in chosen]


def _nothing(
    model: nn.Module, pattern: str, regex: re.Pattern[str], carriers: Mapping[str, nn.Module]
) -> str:
    other = [name for name, _ in model.named_modules() if name and regex.fullmatch(name)]
    if other:
        kind = type(model.get_submodule(other[0])).__name__
        inside = [name for name in carriers if name.startswith(other[0] + ".")]
        reason = f"matches {other[0]!r}, a {kind}, which is no nn.Linear, nn.Conv2d or nn.Embedding"
        near = inside[:5] or difflib.get_close_matches(pattern, carriers, 5, 0.3)
    else:
        reason = "matches nothing"
        near = difflib.get_close_matches(pattern, carriers, 5, 0.3)
    hint = ", ".join(near) if near else f"the model's {len(carriers)} carriers look different"
    return f"site pattern {pattern!r} {reason}. Nearest names: {hint}"


def sites_of(model: nn.Module, patterns: str | Sequence[str]) -> list[Site]:
    """Sites that match, from shapes alone: works on a model on the meta device.

    Raises:
        ModelError: see `select`; or a module that no adapter can follow.
    """
    return [Site.of(name, model.get_submodule(name)) for name in select(model, patterns)]


def group_sites(adapter: Adapter, sites: Sequence[Site]) -> list[Site]:
    """Form the groups that share leaves: one per projection type, that is last part of the name and shape.

    Args:
        adapter: sites are returned unchanged if it has no group leaves.
        sites: in the model's order, which numbers the members.
    """
    if not any(leaf.scope == "group" for site in sites for leaf in adapter.leaves(site).values()):
        return list(sites)
    groups: dict[str, list[str]] = {}
    keys = {site.name: f"{site.name.rsplit('.', 1)[-1]}:{site.d_out}x{site.d_in}" for site in sites}
    for site in sites:
        groups.setdefault(keys[site.name], []).append(site.name)
    return [
        site.in_group(keys[site.name], len(groups[keys[site.name]]), groups[keys[site.name]].index(site.name))
        for site in sites
    ]


def attach(
    model: nn.Module,
    adapter: Adapter,
    patterns: str | Sequence[str],
    *,
    seed: int,
    stats: Mapping[str, Mapping[str, Tensor]] | None = None,
    bases: Mapping[str, Mapping[str, Tensor]] | None = None,
    freeze: bool = True,
) -> AdapterSet:
    """Replace every matching module by an `AdapterLayer` around it.

    Weights that several modules share are fine: an adapter changes its own module only, and merging gives that
        module a weight of its
    own. A module that sits at several places of the model gets one adapter for all of them.

    Args:
        model: any module with materialised, unsharded weights.
        adapter: the parametrisation.
        patterns: see `select`.
        seed: the run's seed.
        stats: per site name, for adapters with ``Basis.STATS``; see `fednano.adapters.stats`.
        bases: per site name, shipped bases; used instead of computing any.
        freeze: whether all the model's own parameters stop taking gradients until `AdapterSet.detach`.

    Raises:
        ModelError: nothing matches, a site already carries an adapter, or a module or weight cannot carry one.
        ConfigError: the adapter does not fit a site.
    """
    sites = group_sites(adapter, sites_of(model, patterns))
    for site in sites:
        _refuse_bypassed(model, site.name)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    layers: dict[str, AdapterLayer] = {}
    shared: dict[str, dict[str, nn.Parameter]] = {}
    for site in sites:  # every layer is built before the model is touched: an error leaves it as it was
        module = model.get_submodule(site.name)
        layer = AdapterLayer(
            adapter,
            site,
            seed=seed,
            base=module,
            stats=(stats or {}).get(site.name),
            basis=None if bases is None else bases.get(site.name, {}),
            shared=shared.get(site.group) if site.group else None,
        )
        if site.group and site.group not in shared:
            grouped = {name for name, leaf in layer.leaves().items() if leaf.scope == "group"}
            shared[site.group] = {name: layer.theta[name] for name in grouped}
        layers[site.name] = layer.train(module.training)
    places = [
        (parent, child, layer)
        for name, layer in layers.items()
        for parent in model.modules()
        for child, module in parent._modules.items()
        if module is layer.base and not isinstance(parent, AdapterLayer)
    ]
    for parent, child, layer in places:
        parent._modules[child] = layer
    if freeze:
        for parameter in flags:
            parameter.requires_grad_(False)
    return AdapterSet(layers, seed=seed, places=places, flags=flags)


def _refuse_bypassed(model: nn.Module, name: str) -> None:
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, AdapterLayer):
        raise ModelError(
            f"site {parent.site.name!r} already carries adapter {parent.adapter.spec}; detach it first"
        )
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise ModelError(
            f"site {name!r} sits in an nn.{type(parent).__name__}, which reads the weight without calling the "
            "module, so an adapter "
            "there would be ignored; adapt other modules, or use an attention with separate projections"
        )
