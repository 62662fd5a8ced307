"""Federated unlearning on a finished run: rounds of the owner's steps and everybody's, merged into a shadow adapter.

The run's own adapter is never written. A round sends the shadow adapter to all parties; the owner of the forget set
takes steps on its forget and retained samples, the others cross-entropy steps; the updates are averaged. The owner
weighs as much as all others together, so that what is minimised is the paper's sum of a forget and a retain term,
whatever the number of clients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fednano.aggregation import create_rule, validate
from fednano.errors import ConfigError, Interrupted, TrainingDiverged, UpdateRefused
from fednano.federation.server import spec_of
from fednano.unlearning.fila import Pair
from fednano.unlearning.fila_bridge import can_factorise, change_pairs
from fednano.unlearning.local import LocalResult
from fednano.unlearning.measure import Perturbed
from fednano.unlearning.methods import Method, get_method
from fednano.unlearning.outcome import RoundRecord, Status, UnlearnOutcome, UnlearnRequest
from fednano.unlearning.parties import Contribution, LocalParties, Parties, RoundPlan
from fednano.unlearning.sites import SiteData, first_exposure
from fednano.unlearning.start import Start, fila_start, plain_start
from fednano.unlearning.workspace import Probe, Workspace

__all__ = ["carry_out", "unlearn", "untouched"]


def _say_nothing(_: RoundRecord) -> None:
    pass


def _go_on() -> bool:
    return False


def unlearn(
    request: UnlearnRequest,
    *,
    progress: Callable[[RoundRecord], None] = _say_nothing,
    stop: Callable[[], bool] = _go_on,
    sites: Mapping[str, SiteData] | None = None,
    perturbed: Mapping[str, Perturbed] | None = None,
) -> UnlearnOutcome:
    """Compute a shadow adapter that has forgotten the samples. The run folder is only read.

    Args:
        request: what to forget, and how.
        progress: called after each round.
        stop: asked between parties; true ends with what was reached.
        sites: site to its samples; by default those of the simulated run.
        perturbed: sample id to other answers, for truth ratios.

    Raises:
        RunError: there is no such run, or its base model is another one now.
        DataError: the scope cannot be forgotten: unknown site or ids, nothing named, or nothing left to retain.
        ConfigError: the method does not fit the run's adapter.
    """
    began = time.monotonic()
    with Workspace(
        request.run,
        request.client,
        request.samples,
        runs_dir=request.runs_dir,
        sites=sites,
        perturbed=perturbed,
        seed=request.seed,
        withheld=request.withheld,
    ) as work:
        exposure = first_exposure(
            work.folder, work.config, work.sites[request.client], request.client, work.scope.forget
        )
        if exposure is None:
            return untouched(request, work.leaves, began, ignored=work.scope.ignored)
        parties = LocalParties(work, request, get_method(request.method), stop)
        return carry_out(request, parties, exposure, work.scope.ignored, progress=progress, began=began)


def untouched(
    request: UnlearnRequest, leaves: Mapping[str, Tensor], began: float, *, ignored: tuple[str, ...] = ()
) -> UnlearnOutcome:
    """The outcome of a job whose samples no round has trained on: nothing is done."""
    return UnlearnOutcome(
        status="never trained on",
        leaves=dict(leaves),
        best_round=0,
        records=[],
        before=None,
        after=None,
        thresholds={},
        start={},
        pairs={},
        exact=True,
        first_exposure=None,
        ignored=ignored,
        client_seconds=0.0,
        seconds=time.monotonic() - began,
        request=request,
    )


def carry_out(
    request: UnlearnRequest,
    parties: Parties,
    exposure: int,
    ignored: tuple[str, ...],
    *,
    progress: Callable[[RoundRecord], None],
    began: float,
) -> UnlearnOutcome:
    """Unlearn with whatever parties there are.

    Args:
        request: what to forget, and how.
        parties: who holds the samples.
        exposure: the first round of the run that trained on one of them.
        ignored: ids that the owner only held out.
        progress: called after each round.
        began: `time.monotonic` at the start.

    Raises:
        ConfigError: the method does not fit the run's adapter, or these parties.
    """
    return _Job(request, parties, exposure, ignored, progress, began).run()


class _Job:
    """One job, after everything is loaded."""

    def __init__(
        self,
        request: UnlearnRequest,
        parties: Parties,
        exposure: int,
        ignored: tuple[str, ...],
        progress: Callable[[RoundRecord], None],
        began: float,
    ) -> None:
        self.request, self.parties, self.exposure, self.ignored = request, parties, exposure, ignored
        self.progress, self.began = progress, began
        self.method: Method = get_method(request.method)
        self.records: list[RoundRecord] = []
        self.client_seconds = 0.0

    def run(self) -> UnlearnOutcome:
        parties = self.parties
        self.before = parties.measure(parties.leaves)
        unseen = self.before.unseen
        self.thresholds: dict[str, float | None] = {
            "ma": unseen.ma,
            "el": unseen.el,
            "utility": self.request.utility_floor * self.before.utility,
        }
        if self.method.exact:
            return self._retrain()
        start = self._start()
        self.client_seconds += start.seconds
        status, leaves, best = self._rounds(start)
        pairs = change_pairs(parties.edge, start.prepared, leaves) if start.prepared and best else {}
        return self._outcome(status, leaves, best, start.facts, pairs, exact=False)

    def _start(self) -> Start:
        parties = self.parties
        if not self.method.fila:
            return plain_start(parties.edge, parties.leaves)
        if not can_factorise(parties.edge):
            raise ConfigError(
                "FILA needs adapters whose change is a product of two factors, such as a linear 'nano' or 'lora'; this "
                f"run has {parties.edge.spec()}. Use the method 'ihl', which needs none."
            )
        return fila_start(parties.edge, parties.leaves, parties.rows(), self.request.rank)

    def _rounds(self, start: Start) -> tuple[Status, dict[str, Tensor], int]:
        request, parties = self.request, self.parties
        current, best, best_round, lowest = start.leaves, dict(parties.leaves), 0, math.inf
        too_costly = False
        for number in range(1, request.rounds + 1):
            try:
                current, done = self._round(RoundPlan(number, current, start.moving, start.leaves))
            except Interrupted:
                return "stopped", best, best_round
            except (TrainingDiverged, UpdateRefused):
                return "diverged", best, best_round
            results, moved = [each.result for each in done], sum(each.bytes for each in done)
            record = self._record(number, request.rounds, parties.probe(current), results, moved)
            if not math.isfinite(record.forget_loss) or not math.isfinite(record.utility):
                return "diverged", best, best_round
            self.records.append(record)
            self.progress(record)
            if record.acceptable and record.forget_probability < lowest:
                best, best_round, lowest = current, number, record.forget_probability
            if record.acceptable and record.forgotten:
                return "reached", current, number
            too_costly = too_costly or record.forgotten
        return ("utility floor" if too_costly else "round limit"), best, best_round

    def _round(self, plan: RoundPlan) -> tuple[dict[str, Tensor], list[Contribution]]:
        parties = self.parties
        spec, rule = spec_of(parties.edge, parties.config), create_rule("fedavg")
        state = rule.init(spec, current=plan.leaves, round=plan.number)
        done = parties.round(plan)
        self.client_seconds += sum(each.result.seconds for each in done)
        for each in done:
            validate(each.update, spec, round=plan.number)
            state = rule.add(state, each.update)
        merged = rule.finish(state)
        # What nobody trained keeps its bits; the mean in fixed point may round the last one.
        still = {name: plan.moving[name].to(leaf.device) for name, leaf in merged.items()}
        return {name: leaf.where(still[name], plan.leaves[name]) for name, leaf in merged.items()}, done

    def _record(
        self, number: int, rounds: int, probe: Probe, results: list[LocalResult], moved: int
    ) -> RoundRecord:
        retain = [r.retain_loss for r in results if r.retain_loss is not None]
        floor, ma, el = (self.thresholds[name] for name in ("utility", "ma", "el"))
        assert floor is not None
        assert ma is not None
        forget = probe.forget
        short = forget.el is None or el is None
        return RoundRecord(
            round=number,
            rounds=rounds,
            ihl=forget.ihl,
            forget_loss=forget.loss,
            forget_probability=forget.probability,
            retain_loss=sum(retain) / len(retain) if retain else None,
            el=forget.el,
            ma=forget.ma,
            utility=probe.utility,
            accuracy=probe.accuracy,
            acceptable=probe.utility >= floor,
            forgotten=forget.ma <= ma and (short or float(forget.el or 0) <= float(el or 0)),
            client_seconds=sum(r.seconds for r in results),
            bytes=moved,
        )

    def _retrain(self) -> UnlearnOutcome:
        parties = self.parties
        origin, leaves, rounds = parties.retrained(self.exposure)
        best = origin
        try:
            for done in rounds:
                self.client_seconds += done.seconds
                leaves, best = done.leaves, done.round
                result = LocalResult(None, done.loss, 0, done.steps, done.seconds)
                payload = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())
                total = parties.config.rounds
                record = self._record(
                    done.round, total, parties.probe(leaves), [result], 2 * payload * done.clients
                )
                self.records.append(record)
                self.progress(record)
        except Interrupted:
            return self._outcome("stopped", dict(parties.leaves), 0, {}, {}, exact=False)
        except (TrainingDiverged, UpdateRefused):
            return self._outcome("diverged", dict(parties.leaves), 0, {}, {}, exact=False)
        facts = {"from_round": origin, "first_exposure": self.exposure}
        return self._outcome("retrained", leaves, best, facts, {}, exact=True)

    def _outcome(
        self,
        status: Status,
        leaves: dict[str, Tensor],
        best: int,
        facts: dict[str, Any],
        pairs: dict[str, Pair],
        *,
        exact: bool,
    ) -> UnlearnOutcome:
        unchanged = best == 0 and not exact
        return UnlearnOutcome(
            status=status,
            leaves=leaves,
            best_round=best,
            records=self.records,
            before=self.before,
            after=self.before if unchanged else self.parties.measure(leaves),
            thresholds=self.thresholds,
            start=facts,
            pairs=pairs,
            exact=exact,
            first_exposure=self.exposure,
            ignored=self.ignored,
            client_seconds=self.client_seconds,
            seconds=time.monotonic() - self.began,
            request=self.request,
            notes=tuple(self.parties.notes),
        )
