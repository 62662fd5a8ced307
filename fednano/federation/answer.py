"""Ask a tuned model one question, in this process."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from fednano.data import Sample
from fednano.errors import ConfigError, RunError
from fednano.federation.config import RunConfig
from fednano.federation.gathering import BASIS_FILE, unflatten
from fednano.federation.messages import HostTicket
from fednano.federation.model import build_edge, connect
from fednano.federation.schedules import fit_rank
from fednano.federation.server import config_of
from fednano.models.edge import NanoEdge
from fednano.runs import RunFolder
from fednano.training.answers import generate_answers
from fednano.training.features import FeatureCache

__all__ = ["answer", "tuned_edge"]


def answer(
    run: str,
    question: str,
    *,
    image: Path | None = None,
    max_new_tokens: int = 32,
    untuned: bool = False,
    runs_dir: Path = Path("runs"),
) -> str:
    """The tuned model's greedy answer.

    Args:
        run: a run's id or folder, or ``"latest"``.
        question: what to ask.
        image: an image file to ask about, or ``None``.
        max_new_tokens: longest answer, in tokens.
        untuned: leave the adapters out, to compare.
        runs_dir: folder of the run folders.

    Raises:
        RunError: there is no such run, or its adapter belongs to another model.
        DataError: the image does not decode.
    """
    if not question.strip():
        raise ConfigError("the question is empty; expected a sentence.")
    folder = RunFolder.open(run, root=runs_dir)
    config, edge = tuned_edge(folder, untuned=untuned)
    sample = Sample(id="question", image=image, question=question, answer="")
    with connect(config, HostTicket()) as llm:
        return generate_answers(edge, llm, FeatureCache(edge.edge), [sample], max_new_tokens=max_new_tokens)[
            0
        ]


def tuned_edge(folder: RunFolder, *, untuned: bool = False) -> tuple[RunConfig, NanoEdge]:
    """A run's settings, for one process, and its edge with the final adapters (or fresh ones, if ``untuned``).

    Raises:
        RunError: there is no final adapter, or it belongs to another model.
    """
    config = config_of(folder).changed(placement="local")
    leaves, info = folder.load_adapter()
    file = folder.file(BASIS_FILE)
    edge = build_edge(config, unflatten(load_file(file)) if file.exists() else None)
    if info.get("edge") != edge.edge.fingerprint:
        raise RunError(
            f"the run {folder.path.name} tuned another model than {config.model!r} is now (edge weights "
            f"{str(info.get('edge'))[:16]}, here {edge.edge.fingerprint[:16]}). Restore that model."
        )
    if not untuned:
        fit_rank(edge, leaves)
        edge.load_travelling(leaves)
    return config, edge
