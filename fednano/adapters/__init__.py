"""Adapters: every parametrisation behind one protocol, reachable by name.

::

    adapter = create("nano", rank=8)
    layer = AdapterLayer(adapter, Site("bridge.image", "bridge", 64, 64), seed=0)
    y = layer(x)                      # x (..., 64): x + path(x)
    layer.travelling()                # the leaves that a client sends
"""

from fednano.adapters.layer import AdapterLayer, fingerprint_of
from fednano.adapters.loca import LoCA
from fednano.adapters.lora import FFA, LoRA
from fednano.adapters.method import Method
from fednano.adapters.nano import NanoAdapter
from fednano.adapters.protocol import Adapter, Algebra, Basis, Init, Leaf, Site, Tensors
from fednano.adapters.registry import create, names, options
from fednano.adapters.sparse import SHiRA
from fednano.adapters.xs import LoLDU, LoRASB, LoRAXS, SVFit

__all__ = [
    "FFA",
    "Adapter",
    "AdapterLayer",
    "Algebra",
    "Basis",
    "Init",
    "Leaf",
    "LoCA",
    "LoLDU",
    "LoRA",
    "LoRASB",
    "LoRAXS",
    "Method",
    "NanoAdapter",
    "SHiRA",
    "SVFit",
    "Site",
    "Tensors",
    "create",
    "fingerprint_of",
    "names",
    "options",
]
