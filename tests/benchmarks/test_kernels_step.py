"""The client step that `fednano bench kernels` times: its variants do the same work."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from benchmarks.kernels_step import TINY, Client, kernels, step_variants
from fednano.training.local import adapter_leaves


def test_the_variants_make_the_same_step() -> None:
    client = Client(TINY, 3, torch.device("cpu"))
    before = client.edge.travelling()
    with ExitStack() as stack:
        variants = step_variants(client, stack, encode=True)
        for run in variants.values():
            for index in range(2):
                run(index)
        leaves = {name: leaf.detach().clone() for name, leaf in adapter_leaves(client.edge).items()}
    for stream in ("image", "text"):
        layer = client.peft[stream]
        for name, weight in (("A", layer.lora_A.weight), ("B", layer.lora_B.weight)):
            moved = leaves[f"{stream}.{name}"] - before[f"{stream}.{name}"]
            assert float(moved.abs().max()) > 1e-6, "nothing was learned"
            torch.testing.assert_close(leaves[f"{stream}.{name}"], weight.T, rtol=1e-4, atol=1e-6)


def test_both_ways_give_the_same_fisher() -> None:
    client = Client(TINY, 3, torch.device("cpu"))
    with kernels("on"):
        fused, plain = client.squares(True), client.squares(False)
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-9)
