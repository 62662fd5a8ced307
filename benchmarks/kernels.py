"""Build, check and time every kernel on one GPU: ``fednano bench kernels [--json FILE] [--tune]``.

From a checkout also ``python -m benchmarks.kernels``. Prints a table of ratios, then the gates.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if it ran, whatever the gates say, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="fednano bench kernels", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results file here")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument(
        "--tune", nargs="?", const="", metavar="NAME", help="first search block sizes (of NAME only)"
    )
    parser.add_argument(
        "--table", type=Path, help="where the tuned table goes; the package's own if not given"
    )
    parser.add_argument("--log", type=Path, help="write every timing of the search here")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "fednano bench kernels needs a CUDA device, and torch sees none; run it on a machine with a GPU."
        )
        return 2
    from fednano_kernels import _tuning

    from benchmarks import (
        kernels_adapters,
        kernels_lora,
        kernels_losses,
        kernels_sparse,
        kernels_step,
        kernels_timing,
    )
    from benchmarks.kernels_report import Report
    from benchmarks.results import write_results

    torch.manual_seed(0)
    began = time.monotonic()
    if options.table is not None:
        _tuning.TABLE = options.table
        _tuning.reload()
    if options.tune is not None:
        from benchmarks.kernels_tune import tune

        tune(_tuning.TABLE, options.tune, options.log)
        print(f"tuned in {time.monotonic() - began:.0f} s")
    rate, bandwidth = kernels_timing.product_rate(), kernels_timing.copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name(0)}: copy {bandwidth / 1e12:.2f} TB/s, 8192^3 bf16 {rate / 1e12:.0f} TFLOP/s"
    )
    report = Report(bandwidth)
    cases = {
        "nano_adapter": kernels_adapters.nano_cases,
        "adapter_grad_fisher": kernels_adapters.fisher_cases,
        "grouped_adapter": kernels_lora.grouped_cases,
        "lora_linear": kernels_lora.lora_cases,
        "linear_token_loss": kernels_losses.loss_cases,
        "flat_adamw": kernels_losses.adamw_cases,
        "scatter_seeded": kernels_sparse.sparse_cases,
        "client_step": kernels_step.step_cases,
    }
    for name, case in cases.items():
        if any(part in name for part in options.only.split(",")):
            start = time.monotonic()
            case(report)
            torch.cuda.empty_cache()
            print(f"-- {name}: {time.monotonic() - start:.0f} s")
    print(report.table())
    if options.json is not None:
        write_results(
            options.json,
            rows=report.rows,
            gates=report.gates,
            command="fednano bench kernels --json benchmarks/results/kernels.json",
            hardware={
                **kernels_timing.card(),
                "copy_bytes_per_s": round(bandwidth),
                "bf16_product_flop_per_s": round(rate),
                "seconds": round(time.monotonic() - began),
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
