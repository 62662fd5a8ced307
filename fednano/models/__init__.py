"""Load a multimodal model and divide it: the edge for clients, the language part for the host.

Importing this package is cheap; transformers is loaded when a model is.
"""

from fednano.models.language import LanguageModel, LanguagePart, LocalLLM

__all__ = ["LanguageModel", "LanguagePart", "LocalLLM"]
