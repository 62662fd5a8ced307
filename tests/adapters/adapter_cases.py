"""Every adapter with options, its paper's parameter count, and one site of each kind; used by several test files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fednano.adapters import AdapterLayer, Method, Site, create
from fednano.adapters.tlora import factorise
from fednano.errors import ModelError

Count = Callable[[Site], int]


@dataclass(frozen=True)
class Case:
    """An adapter under test: name, options, and its parameters by the paper's formula."""

    name: str
    count: Count
    options: dict[str, object] = field(default_factory=dict)
    smaller: int = 2  # the rank to shrink to

    @property
    def label(self) -> str:
        """Readable test id."""
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    def create(self) -> Method:
        """The adapter."""
        return create(self.name, **self.options)


def _lora(r: int) -> Count:
    return lambda site: r * (site.d_in + site.d_out)


def _randlora(r: int) -> Count:
    return lambda site: math.ceil(site.full_rank / r) * (r + site.full_rank)


def _tlora(r: int, big: int, parts: int) -> Count:
    def count(site: Site) -> int:
        ins, outs = factorise(site.d_in, parts), factorise(site.d_out, parts)
        return sum(n * n * big * big for n in ins) + sum(n * r * r for n in (*ins, *outs))

    return count


CASES = [
    Case("dense", lambda site: site.d_in * site.d_out),
    Case("nano", _lora(4), {"rank": 4}),
    Case("nano", _lora(4), {"rank": 4, "act": "gelu", "scale": 0.5}),
    Case("lora", _lora(4), {"rank": 4}),
    Case("lora", _lora(4), {"rank": 4, "alpha": 6.0, "rslora": True}),
    Case("lora", _lora(4), {"rank": 4, "alpha": 8.0, "personal": ("B",)}),
    Case("nano", _lora(4), {"rank": 4, "personal": ("A",), "act": "gelu"}),
    Case("ffa", lambda site: 4 * site.d_out, {"rank": 4, "alpha": 8.0}),
    Case("ffa", lambda site: 4 * site.d_in, {"rank": 4, "train": "A"}),
    Case("lora-xs", lambda site: 16, {"rank": 4}),
    Case("lora-xs", lambda site: 16, {"rank": 4, "source": "seed", "sigma": 1e-5}),
    Case("lora-sb", lambda site: 16, {"rank": 4, "step": 0.01}),
    Case("svfit", lambda site: 4, {"rank": 4}),
    Case("loldu", lambda site: 4, {"rank": 4, "alpha": 2.0}),
    Case("shira", lambda site: min(4 * (site.d_in + site.d_out), site.d_in * site.d_out), {"rank": 4}, 1),
    Case("shira", lambda site: 2 * (site.d_in + site.d_out), {"rank": 2, "support": "magnitude"}, 1),
    Case("shira", lambda site: 2 * (site.d_in + site.d_out), {"rank": 2, "support": "gradient"}, 1),
    Case("shira", lambda site: site.d_in * site.d_out // 4, {"density": 0.25, "support": "snip"}, 1),
    Case("loca", lambda site: 20, {"count": 20, "alpha": 2.0}, 7),
    Case("loca", lambda site: 20, {"count": 20, "locations": "gradient"}, 7),
    Case("lamda", lambda site: 4 * site.d_out + 16, {"rank": 4, "alpha": 8.0}),
    Case("lamda", lambda site: 3 * site.d_out + 16, {"rank": 4, "frozen_columns": 1}),
    Case("lamda", lambda site: 16, {"rank": 4, "frozen_columns": 4}),
    Case("nola", lambda site: 11, {"rank": 4, "coefficients_a": 5, "coefficients_b": 6, "store": "never"}),
    Case("nola", lambda site: 11, {"rank": 4, "coefficients_a": 5, "coefficients_b": 6}),
    Case("nola", lambda site: 6, {"rank": 4, "coefficients_b": 6, "frozen_a": True, "store": "never"}),
    Case("randlora", _randlora(3), {"rank": 3, "alpha": 6.0}),
    Case(
        "randlora",
        lambda site: 4 * -(-site.full_rank // 4),
        {"rank": 4, "train_gamma": False, "sparse": True},
    ),
    Case("mos", lambda site: 2 * (site.d_in + site.d_out), {"rank": 4, "pool_rank": 2, "shards": 2}),
    Case("mos", lambda site: 3 * (site.d_in + site.d_out), {"rank": 4, "pool_rank": 3, "private_rank": 0}),
    Case("wara", lambda site: site.d_in + site.d_out, {"rank": 2}, 1),
    Case("wara", lambda site: 2 * (site.d_in + site.d_out), {"rank": 2, "bands": "own"}, 1),
    Case("tlora", _tlora(3, 2, 2), {"rank": 3, "transform_rank": 2, "factors": 2}, 1),
    Case("snella", lambda site: 4 * (site.d_in + site.d_out) + 3, {"rank": 4}),
    Case("salt", lambda site: 2 * 3 + 2 * 2 * (site.full_rank - 3), {"rank": 2, "top": 3}, 1),
    Case(
        "salt", lambda site: 2 * 3 + 2 * 2 * (site.full_rank - 3), {"rank": 2, "top": 3, "official": True}, 1
    ),
    Case(
        "convlora",
        lambda site: 4 * site.kernel[0] * (site.d_in // site.kernel[0] + site.d_out * site.kernel[0]),
        {"rank": 4},
    ),
    Case(
        "sltrain",
        lambda site: _lora(4)(site) + int(0.1 * site.d_in * site.d_out),
        {"rank": 4, "density": 0.1},
    ),
    Case(
        "sltrain",
        lambda site: _lora(4)(site) + int(0.1 * site.d_in * site.d_out),
        {"rank": 4, "density": 0.1, "start_from": "zero"},
    ),
    Case(
        "lost",
        lambda site: _lora(4)(site) + max(1, site.d_in // 4) * site.d_out,
        {"rank": 4, "density": 0.25},
    ),
    Case(
        "lost",
        lambda site: _lora(4)(site) + max(1, site.d_in // 4) * site.d_out,
        {"rank": 4, "density": 0.25, "act": "linear"},
    ),
    Case(
        "lost",
        lambda site: _lora(4)(site) + max(1, site.d_in // 4) * site.d_out,
        {"rank": 4, "density": 0.25, "start_from": "zero"},
    ),
    Case(
        "lost",
        lambda site: _lora(4)(site) + max(1, site.d_in // 4) * site.d_out,
        {"rank": 4, "density": 0.25, "act": "linear", "start_from": "zero"},
    ),
]

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 8),
    "wide": lambda: nn.Linear(8, 12, bias=False),
    "conv2d": lambda: nn.Conv2d(4, 6, 2, stride=2, padding=1),
    "grouped": lambda: nn.Conv2d(8, 6, 2, groups=2, bias=False),
    "embedding": lambda: nn.Embedding(10, 6),
}
KINDS = [*MODULES, "bridge"]
MAIN = ["linear", "conv2d", "embedding", "bridge"]


def module_and_site(kind: str) -> tuple[nn.Module | None, Site]:
    """A small module and its site."""
    if kind == "bridge":
        return None, Site("bridge.image", "bridge", 8, 8)
    torch.manual_seed(0)
    module = MODULES[kind]()
    return module, Site.of(f"model.{kind}", module)


def inputs(site: Site, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A small batch for a site."""
    generator = torch.Generator().manual_seed(seed)
    if site.kind == "embedding":
        return torch.randint(0, site.d_in, (3, 5), generator=generator)
    if site.kind == "conv2d":
        channels = site.d_in // (site.kernel[0] * site.kernel[1]) * site.groups
        return torch.randn(2, channels, 5, 4, generator=generator, dtype=dtype)
    return torch.randn(3, 4, site.d_in, generator=generator, dtype=dtype)


def stats(site: Site) -> dict[str, Tensor]:
    """A gradient."""
    generator = torch.Generator().manual_seed(7)
    return {"gradient": torch.randn(site.d_out, site.d_in, generator=generator)}


def build(case: Case, kind: str, *, seed: int = 0) -> AdapterLayer:
    """The layer of a case at a kind of site."""
    module, site = module_and_site(kind)
    return AdapterLayer(case.create(), site, seed=seed, base=module, stats=stats(site))


def move(layer: AdapterLayer, scale: float = 0.3, seed: int = 0) -> AdapterLayer:
    """Add independent normal noise to every trainable leaf, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in layer.theta.values():
            value.add_(
                scale * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            )
    return layer


def fits(case: Case, kind: str) -> bool:
    """Whether the adapter accepts the site, by asking it."""
    try:
        case.create().leaves(module_and_site(kind)[1])
    except ModelError:
        return False
    return True


def supported(kinds: list[str]) -> Iterator[tuple[Case, str]]:
    """Every adapter at every one of some kinds of sites that it accepts."""
    return ((case, kind) for case in CASES for kind in kinds if fits(case, kind))
