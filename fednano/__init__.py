"""fednano: federated adapter tuning for multimodal LLMs, with the LLM on the server."""

__version__ = "0.1.0"

from fednano.api import (
    compare,
    dashboard,
    doctor,
    export,
    generate,
    init,
    report,
    simulate,
    status,
    strategies,
)

__all__ = [
    "__version__",
    "compare",
    "dashboard",
    "doctor",
    "export",
    "generate",
    "init",
    "report",
    "simulate",
    "status",
    "strategies",
]
