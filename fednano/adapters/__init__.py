"""Adapters: every parametrisation behind one protocol, reachable by name.

::

    adapter = create("nano", rank=8)
    layer = AdapterLayer(adapter, Site("bridge.image", "bridge", 64, 64), seed=0)
    y = layer(x)                      # x (..., 64): x + path(x)
    layer.travelling()                # the leaves that a client sends

    adapters = attach(model, create("lora", rank=16), "model.layers.*.self_attn.{q,v}_proj", seed=0)
    adapters.travelling()
    adapters.detach()
"""

from fednano.adapters.adapter_set import AdapterSet, Plan, plan, wire_leaves
from fednano.adapters.attach import attach, group_sites, select, sites_of
from fednano.adapters.checkpoint import attach_checkpoint, load_checkpoint, read_checkpoint, save_checkpoint
from fednano.adapters.checks import fingerprint_of
from fednano.adapters.convlora import ConvLoRA
from fednano.adapters.dense import Dense
from fednano.adapters.lamda import LaMDA
from fednano.adapters.layer import AdapterLayer
from fednano.adapters.loca import LoCA
from fednano.adapters.lora import FFA, LoRA
from fednano.adapters.method import Method
from fednano.adapters.mos import MoS
from fednano.adapters.nano import NanoAdapter
from fednano.adapters.nola import NOLA
from fednano.adapters.peft_io import (
    ExportedSite,
    export_merged,
    export_peft,
    import_peft,
    lora_factors,
    write_lora,
)
from fednano.adapters.protocol import Adapter, Algebra, Basis, Init, Leaf, Site, Tensors
from fednano.adapters.randlora import RandLoRA
from fednano.adapters.registry import create, names, options, register
from fednano.adapters.salt import SALT
from fednano.adapters.scratch import LOST, SLTrain
from fednano.adapters.snella import SNELLA
from fednano.adapters.sparse import SHiRA
from fednano.adapters.stats import combine_gradients, gradients_of, probe
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
    "AdapterSet",
    "Algebra",
    "Basis",
    "ConvLoRA",
    "Dense",
    "ExportedSite",
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
    "Plan",
    "RandLoRA",
    "SHiRA",
    "SLTrain",
    "SVFit",
    "Site",
    "TLoRA",
    "Tensors",
    "WaRA",
    "attach",
    "attach_checkpoint",
    "combine_gradients",
    "create",
    "export_merged",
    "export_peft",
    "fingerprint_of",
    "gradients_of",
    "group_sites",
    "import_peft",
    "load_checkpoint",
    "lora_factors",
    "names",
    "options",
    "plan",
    "probe",
    "read_checkpoint",
    "register",
    "save_checkpoint",
    "select",
    "sites_of",
    "wire_leaves",
    "write_lora",
]
