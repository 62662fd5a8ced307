"""fednano: federated adapter tuning for multimodal LLMs, with the LLM on the server."""

__version__ = "0.1.0"
__all__ = ["__version__"]
