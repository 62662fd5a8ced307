"""The methods that the runner knows: what the owner's steps minimise, and where they start.

Every one is federated in the same way: the owner of the forget set takes its own steps, all other clients take
cross-entropy steps on their data, and the updates are averaged into a shadow adapter. They differ in the owner's loss,
a forget term plus a term on its retained samples, both with coefficient 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fednano.errors import ConfigError

__all__ = ["Method", "get_method", "method_names", "method_table"]

ForgetTerm = Literal["inverted_hinge", "gradient_ascent", "npo", "simnpo", "preference", "refusal", "nothing"]
RetainTerm = Literal["cross_entropy", "kl", "nothing"]


@dataclass(frozen=True)
class Method:
    """One way to unlearn.

    Attributes:
        name: what a user asks for.
        summary: one line.
        paper: arXiv id.
        forget: the owner's loss on its forget set.
        retain: the owner's loss on its retained samples.
        fila: whether the start is FILA's and only its components are trained.
        exact: whether the result never saw the forgotten samples.
    """

    name: str
    summary: str
    paper: str
    forget: ForgetTerm
    retain: RetainTerm = "cross_entropy"
    fila: bool = False
    exact: bool = False


_METHODS = {
    method.name: method
    for method in (
        Method("loku", "inverted hinge from a FILA start", "2408.06621", "inverted_hinge", fila=True),
        Method("ihl", "inverted hinge on the adapter as it is", "2408.06621", "inverted_hinge"),
        Method(
            "gradient_ascent", "raise the loss, without bound", "2210.01504", "gradient_ascent", "nothing"
        ),
        Method("gradient_difference", "raise it here, lower it there", "2203.12817", "gradient_ascent"),
        Method("kl", "raise it, stay near the model before", "2401.06121", "gradient_ascent", "kl"),
        Method("npo", "negative preference optimisation", "2404.05868", "npo"),
        Method("simnpo", "NPO without a reference model", "2410.07163", "simnpo"),
        Method("dpo", "prefer 'I do not know' to the answer", "2305.18290", "preference"),
        Method("idk", "learn 'I do not know' as the answer", "2401.06121", "refusal"),
        Method("retrain", "train again without the samples", "1912.03817", "nothing", exact=True),
    )
}


def method_names() -> tuple[str, ...]:
    """Names that `get_method` knows."""
    return tuple(_METHODS)


def get_method(name: str) -> Method:
    """A method by name.

    Raises:
        ConfigError: there is no such method; the message lists those there are.
    """
    if name not in _METHODS:
        raise ConfigError(f"unknown unlearning method {name!r}; there are: {', '.join(_METHODS)}.")
    return _METHODS[name]


def method_table() -> list[dict[str, str]]:
    """One row a method, for people."""
    return [
        {
            "method": method.name,
            "what": method.summary,
            "forget": method.forget.replace("_", " "),
            "retain": method.retain.replace("_", " "),
            "exact": "yes" if method.exact else "no",
            "paper": method.paper,
        }
        for method in _METHODS.values()
    ]
