"""In the machine code of the loss kernel a barrier stands between the last read of a logit and the first gradient.

Every warp reads the logit of the label, and one of them writes that element's gradient over it. Without a barrier the
losses (and the gradients of NPO) were wrong now and then, which compute-sanitizer brought to light by slowing down some
warps; no run at full speed had shown it. The code is compiled for a card, so the test needs none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMPILE = """
import json, warnings
warnings.simplefilter("ignore")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fednano_kernels import _token_loss_triton as loss

SIGNATURE = {"logits": "*fp32", "labels": "*i64", "reference": "*fp32", "losses": "*fp32"}
SIGNATURE |= {"stride": "i32", "V": "i32", "beta": "fp32"}
names, found = loss._kernel.arg_names, {}
for objective, whole in [*((name, True) for name in loss._KINDS), ("npo", False)]:
    constants = {"KIND": loss._KINDS[objective], "GRAD": True, "ONE_TILE": whole, "BLOCK": 256, "LANES": 256}
    constants |= {"PRECISION": "ieee", "STAGES": 2}
    signature = {**SIGNATURE, **dict.fromkeys(constants, "constexpr")}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(loss._kernel, signature, places)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    found[f"{objective}, one tile: {whole}"] = made.asm["ptx"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def code() -> dict[str, str]:
    """PTX (text of NVIDIA's assembler) by objective and shape of the row."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return result


def order(text: str) -> list[str]:
    """Reads ``R`` and writes ``W`` of global memory, and barriers ``B``, as they stand in the program."""
    marks = {"ld.global": "R", "st.global": "W", "bar.sync": "B"}
    return [mark for line in text.splitlines() for name, mark in marks.items() if name in line]


def test_nobody_writes_a_gradient_before_all_have_read_the_logits(code: dict[str, str]) -> None:
    assert len(code) == 5
    for name, text in code.items():
        steps = "".join(order(text))
        before, _, _ = steps.partition("W")
        assert before.rindex("B") > before.rindex("R"), f"{name}: {steps}"
