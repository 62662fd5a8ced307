"""The runner of this package (:mod:`fednano.unlearning.runner`) behind the worker's Protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fednano.errors import Interrupted
from fednano.runs import RunFolder
from fednano.unlearning.jobs.runner import Result, Round, Task

if TYPE_CHECKING:
    from fednano.unlearning.outcome import RoundRecord, UnlearnOutcome, UnlearnRequest
    from fednano.unlearning.sites import SiteData

__all__ = ["LokuRunner", "result_of", "round_of", "with_earlier", "with_reference"]

_REASONS = {
    "round limit": "the round limit came before the forget set looked like unseen data; allow more rounds or steps",
    "utility floor": "forgetting would have cost more utility than the floor allows",
    "diverged": "the training diverged; try fewer steps",
    "never trained on": "none of the samples was ever trained on",
}


class LokuRunner:
    """Hands tasks to :func:`fednano.unlearning.runner.unlearn`; any of its methods.

    Args:
        data: site -> its own data folder, for runs of real sites; every site's is needed then.
        reference: also retrain without the samples, and put what that adapter scores beside the unlearned one's. As
            dear as the run was, from the first round that saw one of them.
        allow_unprotected: also where the run's updates were protected; see `fednano.unlearning.protection`.
        probes: of `fednano.unlearning.probes.PROBES`; what they find stands in the receipt.
    """

    def __init__(
        self,
        data: Mapping[str, Path] | None = None,
        *,
        reference: bool = False,
        allow_unprotected: bool = False,
        probes: tuple[str, ...] = (),
    ) -> None:
        self._data, self._reference, self._probes = dict(data or {}), reference, probes
        self._allow_unprotected = allow_unprotected

    def __call__(self, task: Task, *, progress: Callable[[Round], None], stop: Callable[[], bool]) -> Result:
        """Unlearn; see :class:`~fednano.unlearning.jobs.runner.Runner`.

        Raises:
            RunError: the run's updates were protected, and that this job's are not is not allowed.
        """
        from fednano.federation.server import config_of
        from fednano.runs.checkpoints import pack
        from fednano.unlearning.outcome import UnlearnRequest
        from fednano.unlearning.protection import require_unprotected
        from fednano.unlearning.runner import unlearn

        lost = require_unprotected(config_of(RunFolder(task.run)), allowed=self._allow_unprotected)

        def tell(record: RoundRecord) -> None:
            progress(round_of(record))

        request = UnlearnRequest(
            run=task.run,
            client=task.site,
            samples=task.samples,
            withheld=task.withheld,
            runs_dir=task.run.parent,
            **vars(task.plan),
        )
        sites = self._sites(task.run)
        outcome = unlearn(request, progress=tell, stop=stop, sites=sites)
        if outcome.status == "stopped":
            raise Interrupted("the unlearning was asked to end.")
        result = result_of(outcome, pack(outcome.leaves), notes=lost)
        if result.accepted:
            result = self._looked_harder(task, request, outcome, result)
        if not self._reference or not result.accepted or outcome.exact:
            return result  # nothing to judge, or exact already
        retrained = unlearn(
            replace(request, method="retrain"), progress=lambda record: None, stop=stop, sites=sites
        )
        if retrained.status == "stopped":
            raise Interrupted("the unlearning was asked to end.")
        return with_reference(result, outcome, retrained)

    def _looked_harder(
        self, task: Task, request: UnlearnRequest, outcome: UnlearnOutcome, result: Result
    ) -> Result:
        """A result with the probes that were asked for, and with what the adapter knows of earlier forget sets."""
        from fednano.federation.server import config_of
        from fednano.runs.tombstones import Tombstones, read_tombstones
        from fednano.unlearning.probes import earlier_sets, probe_all
        from fednano.unlearning.sites import all_sites
        from fednano.unlearning.workspace import Workspace

        forgotten = read_tombstones(task.run)
        if not self._probes and not forgotten.sets:
            return result
        with Workspace(
            *(task.run, task.site, task.samples),
            runs_dir=task.run.parent,
            sites=self._sites(task.run),
            seed=request.seed,
            withheld=task.withheld,
        ) as work:
            probes: dict[str, Any] = {}
            if self._probes and outcome.after is not None and outcome.before is not None:
                level = max(outcome.after.forget.exact_memorisation, outcome.before.unseen.exact_memorisation)
                probes = probe_all(work, outcome.leaves, self._probes, level=level)
            folder, earlier = RunFolder(task.run), {}
            if forgotten.sets:
                everything = all_sites(folder, config_of(folder), self._data, Tombstones())
                earlier = earlier_sets(work, outcome.leaves, everything, forgotten)
        return with_earlier(replace(result, probes=probes), earlier)

    def _sites(self, run: Path) -> dict[str, SiteData] | None:
        """Real sites' samples; ``None`` leaves it to the runner, which knows simulated ones."""
        if not self._data:
            return None
        from fednano.federation.server import config_of
        from fednano.runs.tombstones import read_tombstones
        from fednano.unlearning.sites import all_sites

        folder = RunFolder(run)
        return all_sites(folder, config_of(folder), self._data, read_tombstones(run))


def with_earlier(result: Result, earlier: Mapping[str, Any]) -> Result:
    """A result with the figures of earlier forget sets; one that would bring any of them back is not accepted."""
    back = [
        f"it would bring back what job {job} forgot (exact memorisation {each['exact_memorisation']:.3f}, then "
        f"{each['level']:.3f})"
        for job, each in earlier.items()
        if each is not None and each["back"]
    ]
    return replace(
        result, earlier=dict(earlier), accepted=result.accepted and not back, reasons=(*result.reasons, *back)
    )


def round_of(record: RoundRecord) -> Round:
    """A round as the worker and the live view have it."""
    return Round(
        record.round,
        record.rounds,
        record.ihl,
        record.retain_loss,
        record.el,
        record.ma,
        record.utility,
    )


def result_of(outcome: UnlearnOutcome, payload: bytes, *, notes: tuple[str, ...] = ()) -> Result:
    """An outcome as the worker and the receipt have it; ``notes`` join what was approximated."""
    figures: Any = outcome.to_json()
    reason = _REASONS.get(outcome.status)
    return Result(
        payload=payload,
        before=figures["before"] or {},
        after=figures["after"] or {},
        thresholds=outcome.thresholds,
        seconds=outcome.seconds,
        client_seconds=outcome.client_seconds,
        bytes=sum(record.bytes for record in outcome.records),
        rounds=len(outcome.records),
        stopped=outcome.status,
        accepted=reason is None,
        reasons=() if reason is None else (reason,),
        approximations=(*_approximations(outcome), *notes),
    )


def with_reference(result: Result, outcome: UnlearnOutcome, retrained: UnlearnOutcome) -> Result:
    """A result with the figures of an adapter that was retrained without the samples, and the comparison."""
    from fednano.unlearning.measure import against_reference

    figures: Any = retrained.to_json()["after"]
    if figures is None or outcome.after is None:
        return result
    compared = against_reference(outcome.after, retrained.after)
    known = {name: value for name, value in asdict(compared).items() if value is not None}
    return replace(
        result,
        reference={**figures, "comparison": known, "client_seconds": retrained.client_seconds},
        reference_kind="retrained",
    )


def _approximations(outcome: UnlearnOutcome) -> tuple[str, ...]:
    """What was not computed as the method's paper has it, by name."""
    if outcome.exact:
        return ()
    method = outcome.request.method if outcome.request is not None else "unknown"
    names = [f"unlearning by {method}: gradients of the forget set are counteracted, not taken out"]
    fisher = outcome.start.get("fisher")
    if fisher:
        names.append(f"relative Fisher: {fisher}")
    return (*names, *outcome.notes)
