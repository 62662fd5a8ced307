"""Look harder for what was forgotten: other questions, coarser numbers, a few steps of learning it again.

An adapter can look unlearned only to the very questions that it was unlearned on. Each probe asks for the forget set
in another way and says how much of its answers is there: after rounding the adapter (quantisation brought back most of
what full precision had hidden, arXiv:2410.16454), in other words, with the picture or the text alone, after relearning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fednano.data import Sample
from fednano.errors import ConfigError
from fednano.federation.resurfacing import threshold
from fednano.runs.tombstones import Tombstones
from fednano.training.data import ClientData
from fednano.training.guard import known_again
from fednano.unlearning.local import LocalSettings, steps
from fednano.unlearning.measure import score_set
from fednano.unlearning.sites import SiteData
from fednano.unlearning.workspace import Workspace

__all__ = ["PROBES", "check_probes", "earlier_sets", "is_back", "probe_all", "quantised"]

STEPS = (1, 2, 5, 10)
"""After so many optimiser steps relearning is looked at."""
WORDINGS = ("please tell me: {}", "question: {} answer:", "can you say {}", "{} tell me the answer.")
"""Other words for a question, where nobody gave better ones."""
PICTURE_ONLY = "describe the image"
"""What is asked of a picture whose question is left out."""


@dataclass(frozen=True)
class _Job:
    work: Workspace
    leaves: Mapping[str, Tensor]
    level: float
    paraphrases: Mapping[str, Sequence[str]]

    def scores(self, samples: Sequence[Sample], leaves: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """What is known of some samples."""
        work = self.work
        work.edge.load_travelling(self.leaves if leaves is None else leaves)
        found = score_set(work.edge, work.llm, work.data(samples), el=False)
        return {
            "samples": found.samples,
            "exact_memorisation": found.exact_memorisation,
            "extraction_strength": found.extraction_strength,
            "probability": found.probability,
            "level": self.level,
            "back": is_back(found.exact_memorisation, self.level, found.samples),
        }


def is_back(value: float, level: float, samples: int) -> bool:
    """Whether exact memorisation of a forgotten set lies well above what unseen samples show; see `threshold`."""
    return value > threshold(level, samples)


def check_probes(text: str) -> tuple[str, ...]:
    """Names in a list with commas.

    Raises:
        ConfigError: there is no such probe; the message lists those there are.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in PROBES]:
        raise ConfigError(f"unknown probe {unknown[0]!r}; there are: {', '.join(PROBES)}.")
    if not names:
        raise ConfigError(f"no probe is named; there are: {', '.join(PROBES)}.")
    return names


def probe_all(
    work: Workspace,
    leaves: Mapping[str, Tensor],
    names: Iterable[str],
    *,
    level: float,
    paraphrases: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Probe an unlearned adapter.

    Args:
        work: the run, with the forget set as its scope.
        leaves: the adapter.
        names: of `PROBES`.
        level: exact memorisation of samples that were never trained on.
        paraphrases: sample id to its question in other words; by default `WORDINGS`.

    Returns:
        Probe to figures; ``None`` where it cannot be made of these samples.
    """
    job = _Job(work, dict(leaves), level, paraphrases or {})
    with torch.random.fork_rng(devices=[]):
        return {name: PROBES[name](job) for name in names}


def quantised(leaves: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Leaves rounded to ``bits`` with one scale a row, to nearest and symmetric, as floats again.

    Args:
        leaves: tensors of any shape; rows run along the last dimension.
        bits: 2 to 8.
    """
    most = 2 ** (bits - 1) - 1
    found = {}
    for name, leaf in leaves.items():
        scale = leaf.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(leaf.dtype).tiny) / most
        found[name] = (leaf / scale).round().clamp(-most, most) * scale
    return found


def _rounded(bits: int) -> Callable[[_Job], dict[str, Any]]:
    def probe(job: _Job) -> dict[str, Any]:
        coarse = quantised(job.leaves, bits)
        return {
            **job.scores(job.work.scope.forget, coarse),
            "utility": job.work.probe(coarse).utility,
            "utility_before": job.work.probe(job.leaves).utility,
        }

    return probe


def _paraphrased(job: _Job) -> dict[str, Any]:
    forget = job.work.scope.forget
    if job.paraphrases:
        own = [replace(s, question=text) for s in forget for text in job.paraphrases.get(s.id, ())]
        return {**job.scores(own), "given": True} if own else {"samples": 0, "given": True}
    each = [job.scores([replace(s, question=words.format(s.question)) for s in forget]) for words in WORDINGS]
    return {
        **max(each, key=lambda row: float(row["exact_memorisation"])),
        "wordings": len(each),
        "given": False,
    }


def _picture_only(job: _Job) -> dict[str, Any] | None:
    own = [replace(s, question=PICTURE_ONLY) for s in job.work.scope.forget if s.image is not None]
    return job.scores(own) if own else None


def _text_only(job: _Job) -> dict[str, Any] | None:
    own = [replace(s, image=None) for s in job.work.scope.forget if s.image is not None]
    return job.scores(own) if own else None


def _relearned(job: _Job) -> dict[str, Any] | None:
    """Speed of relearning the forget set against that of as many samples that were never trained on.

    And what comes back by itself while training goes on with retained samples only.
    """
    work = job.work
    forget, unseen = work.scope.forget, work.unseen(len(work.scope.forget))
    kept = work.scope.retain.get(work.scope.owner) or [s for own in work.scope.retain.values() for s in own]
    if len(unseen) < len(forget):
        forget = forget[: len(unseen)]
    curves = {
        "relearned": _curve(job, forget, forget),
        "unseen": _curve(job, unseen, unseen),
        "benign": _curve(job, kept, work.scope.forget),
    }
    gain = {name: [row["probability"] for row in rows] for name, rows in curves.items()}
    known, fresh = (sum(gain[name][1:]) - len(STEPS) * gain[name][0] for name in ("relearned", "unseen"))
    last = curves["benign"][-1]
    return {
        "samples": len(forget),
        "steps": list(STEPS),
        "probability": {name: values[1:] for name, values in gain.items()},
        "start": {name: values[0] for name, values in gain.items()},
        # 1: as slowly as what the model has never seen; 2: twice as fast.
        "speed": known / fresh if fresh > 0 else None,
        "exact_memorisation": last["exact_memorisation"],
        "level": job.level,
        "back": last["back"],
    }


def _curve(job: _Job, learnt: Sequence[Sample], asked: Sequence[Sample]) -> list[dict[str, Any]]:
    """Figures of ``asked`` before and after `STEPS` steps on ``learnt``."""
    work, config = job.work, job.work.config
    rows, current, done = [job.scores(asked)], dict(job.leaves), 0
    moving = {name: torch.ones_like(leaf, dtype=torch.bool) for name, leaf in current.items()}
    for number, until in enumerate(STEPS, start=1):
        settings = LocalSettings(
            steps=until - done,
            batch_size=min(16, len(learnt)),
            learning_rate=config.learning_rate,
            optimizer=config.optimizer,
            clip_norm=config.clip_norm,
        )
        work.edge.load_travelling(current)
        steps(
            *(work.edge, work.llm, settings),
            retain=work.data(learnt),
            moving=moving,
            seed=work.seed,
            client="probe",
            round_number=number,
        )
        current, done = work.edge.travelling(), until
        rows.append(job.scores(asked, current))
    return rows


PROBES: dict[str, Callable[[_Job], dict[str, Any] | None]] = {
    "relearning": _relearned,
    "int8": _rounded(8),
    "int4": _rounded(4),
    "paraphrase": _paraphrased,
    "image-only": _picture_only,
    "text-only": _text_only,
}
"""Probe to what it does."""


def earlier_sets(
    work: Workspace, leaves: Mapping[str, Tensor], everything: Mapping[str, SiteData], forgotten: Tombstones
) -> dict[str, Any]:
    """What an adapter knows of what earlier jobs forgot.

    Args:
        work: the run.
        leaves: the adapter that is to be committed.
        everything: site to all of its samples, the forgotten ones among them.
        forgotten: the run's tombstones.

    Returns:
        Job to figures; ``None`` where its samples are not there any more, or were forgotten without a known level.
    """
    work.edge.load_travelling(leaves)
    found: dict[str, Any] = {}
    for each in forgotten.sets:
        train = list(everything[each.site].train) if each.site in everything else []
        left = {sample.id for sample in Tombstones(1, (each,)).keep(train)}
        gone = [sample for sample in train if sample.id not in left]
        if not gone or each.level is None:
            found[each.job] = None
            continue
        value = known_again(work.edge, work.llm, ClientData(gone, work.edge, work.features))
        found[each.job] = {
            "samples": len(gone),
            "exact_memorisation": value,
            "level": each.level,
            "back": is_back(value, each.level, len(gone)),
        }
    return found
