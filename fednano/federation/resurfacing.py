"""Has it come back? After each round the owners of forgotten samples look whether the adapters know them again.

Unlearned knowledge can resurface when training goes on (arXiv:2601.22601), and a client may train on what it should
leave out, by a fault or by will. So the owner of each forgotten set, which still holds the samples, measures how many
of their answers' tokens are the model's likeliest ones, and the server compares that with the level of the commit.
Only figures travel. A set whose owner has deleted the samples cannot be probed, and the record says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from fednano.federation.exchange import exchange
from fednano.federation.messages import Instruction
from fednano.federation.phase import Federation, Leaves
from fednano.runs import RunFolder
from fednano.runs.tombstones import Tombstone, append_alarm, read_tombstones

__all__ = ["MARGIN", "probe_forgotten", "threshold"]

MARGIN = 0.02
"""Rise of exact memorisation over the level of the commit that is no alarm yet."""


def threshold(level: float, samples: int) -> float:
    """Exact memorisation from which a forgotten set counts as known again.

    Above the level of the commit by `MARGIN`, or by two standard errors of so many samples, whichever is more: of a few
    samples one may be answered rightly by what is learnt elsewhere.

    Args:
        level: the larger one of the set's own after unlearning, and of samples never trained on.
        samples: size of the set.
    """
    level = min(max(level, 0.0), 1.0)
    return level + max(MARGIN, 2 * math.sqrt(level * (1 - level) / max(1, samples)))


def probe_forgotten(fed: Federation, phase: str, number: int, leaves: Leaves) -> dict[str, Any]:
    """Probe all forgotten sets under the adapters of a round, and raise an alarm for those that are known again.

    Returns:
        What goes into the round's record: job to exact memorisation (``None``: out of reach), and the jobs that are
        back; empty where nothing was ever forgotten.
    """
    known = read_tombstones(fed.folder.path)
    every = fed.config.probe_forgotten_every
    if not known.sets or not every or number % every:
        return {}
    owners = sorted({each.site for each in known.sets} & set(fed.nodes))
    base = Instruction(fed.config, phase, number, fed.ticket, False, {}, leaves)
    told = replace(base, basis=fed.basis, run=fed.folder.id)
    deliveries = exchange(
        fed.grid,
        {owner: (fed.nodes[owner], told.to_records()) for owner in owners},
        message_type="query.resurfaced",
        group=f"resurfaced-{phase}-{number}",
        timeout=fed.config.round_timeout,
        stop=fed.stop,
    )
    figures: dict[str, float] = {}
    for delivery in deliveries:
        if delivery.reply.failure is None:
            figures |= delivery.reply.metrics
    found = {each.job: figures.get(each.job) for each in known.sets}
    back = [each for each in known.sets if _is_back(each, figures)]
    for each in back:
        _alarm(fed, each, number, figures[each.job])
    return {"forgotten": found, "resurfaced": [each.job for each in back]}


def _is_back(each: Tombstone, figures: Mapping[str, float]) -> bool:
    value = figures.get(each.job)
    if value is None or each.level is None:
        return False
    return value > threshold(each.level, int(figures.get(f"{each.job}/samples", 0)))


def _alarm(fed: Federation, each: Tombstone, number: int, value: float) -> None:
    """Tell it in the live view, in the run's messages, and in the job's audit, here and where it was committed."""
    text = (
        f"ALARM: what job {each.job} forgot is known again after round {number}: exact memorisation {value:.3f}, at "
        f"the commit {each.level:.3f}. A client may train on it; see fednano unlearn show {each.job}."
    )
    fed.view.message(text, "warning")
    fed.folder.append_event("warning", text)
    line = {
        "job": each.job,
        "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "run": fed.folder.id,
        "round": number,
        "exact_memorisation": value,
        "level": each.level,
    }
    append_alarm(fed.folder.path, line)
    if fed.config.start_from:
        append_alarm(RunFolder.open(fed.config.start_from, root=fed.config.runs_dir).path, line)
