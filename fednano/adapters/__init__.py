"""Adapters: every parametrisation behind one protocol, reachable by name.

::

    adapter = create("nano", rank=8)
    layer = AdapterLayer(adapter, Site("bridge.image", "bridge", 64, 64), seed=0)
    y = layer(x)                      # x (..., 64): x + path(x)
    layer.travelling()                # the leaves that a client sends
"""

from fednano.adapters.convlora import ConvLoRA
from fednano.adapters.lamda import LaMDA
from fednano.adapters.layer import AdapterLayer, fingerprint_of
from fednano.adapters.loca import LoCA
from fednano.adapters.lora import FFA, LoRA
from fednano.adapters.method import Method
from fednano.adapters.mos import MoS
from fednano.adapters.nano import NanoAdapter
from fednano.adapters.nola import NOLA
from fednano.adapters.protocol import Adapter, Algebra, Basis, Init, Leaf, Site, Tensors
from fednano.adapters.randlora import RandLoRA
from fednano.adapters.registry import create, names, options
from fednano.adapters.salt import SALT
from fednano.adapters.scratch import LOST, SLTrain
from fednano.adapters.snella import SNELLA
from fednano.adapters.sparse import SHiRA
from fednano.adapters.tlora import TLoRA
from fednano.adapters.wara import WaRA
from fednano.adapters.xs import LoLDU, LoRASB, LoRAXS, SVFit

__all__ = [
    "FFA",
    "LOST",
    "NOLA",
    "SALT",
    "SNELLA",
    "Adapter",
    "AdapterLayer",
    "Algebra",
    "Basis",
    "ConvLoRA",
    "Init",
    "LaMDA",
    "Leaf",
    "LoCA",
    "LoLDU",
    "LoRA",
    "LoRASB",
    "LoRAXS",
    "Method",
    "MoS",
    "NanoAdapter",
    "RandLoRA",
    "SHiRA",
    "SLTrain",
    "SVFit",
    "Site",
    "TLoRA",
    "Tensors",
    "WaRA",
    "create",
    "fingerprint_of",
    "names",
    "options",
]
