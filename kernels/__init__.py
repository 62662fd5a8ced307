"""Triton kernels and their torch references, imported as ``fednano_kernels``.

Every public function is a differentiable operator on torch tensors. CUDA tensors go to Triton; on any other device, and
where triton is not installed, the plain torch reference beside each kernel runs.
"""

from typing import TYPE_CHECKING

# With a checkout on the path, a library that looks for the package `kernels` of Hugging Face finds this folder under
# its bare name. It must find nothing there: the operators can be registered only once in a process.
if TYPE_CHECKING or __name__ == "fednano_kernels":
    from ._dispatch import KernelArgumentError
    from .adapter_grad_fisher import adapter_grad_fisher, adapter_grad_fisher_reference, nano_adapter_fisher
    from .flat_adamw import flat_adamw_, flat_adamw_reference_
    from .grouped_adapter import grouped_adapter, grouped_adapter_reference
    from .linear_token_loss import OBJECTIVES, linear_token_loss, linear_token_loss_reference
    from .lora_linear import lora_linear, lora_linear_reference
    from .nano_adapter import nano_adapter, nano_adapter_reference
    from .scatter_delta import Support, scatter_delta, scatter_delta_reference
    from .seeded_combine import (
        seeded_combine,
        seeded_combine_reference,
        seeded_uniform,
        seeded_uniform_reference,
    )

    __all__ = [
        "OBJECTIVES",
        "KernelArgumentError",
        "Support",
        "adapter_grad_fisher",
        "adapter_grad_fisher_reference",
        "flat_adamw_",
        "flat_adamw_reference_",
        "grouped_adapter",
        "grouped_adapter_reference",
        "linear_token_loss",
        "linear_token_loss_reference",
        "lora_linear",
        "lora_linear_reference",
        "nano_adapter",
        "nano_adapter_fisher",
        "nano_adapter_reference",
        "scatter_delta",
        "scatter_delta_reference",
        "seeded_combine",
        "seeded_combine_reference",
        "seeded_uniform",
        "seeded_uniform_reference",
    ]
