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

from fednano.aggregation import Update, create_rule, validate
from fednano.errors import Interrupted, TrainingDiverged, UpdateRefused
from fednano.federation.server import spec_of
from fednano.training.data import ClientData
from fednano.unlearning.fila import Pair
from fednano.unlearning.fila_bridge import change_pairs
from fednano.unlearning.local import (
    LocalResult,
    LocalSettings,
    Reference,
    reference_of,
    refusals,
    steps,
)
from fednano.unlearning.measure import Perturbed
from fednano.unlearning.methods import Method, get_method
from fednano.unlearning.outcome import RoundRecord, Status, UnlearnOutcome, UnlearnRequest
from fednano.unlearning.retrain import retrain, starting_point
from fednano.unlearning.sites import SiteData, first_exposure, participants
from fednano.unlearning.start import Start, make_start
from fednano.unlearning.workspace import Probe, Workspace

__all__ = ["unlearn"]


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
    ) as work:
        exposure = first_exposure(
            work.folder, work.config, work.sites[request.client], request.client, work.scope.forget
        )
        if exposure is None:
            return _untouched(request, work, began)
        return _Job(request, work, exposure, progress, stop, began).run()


def _untouched(request: UnlearnRequest, work: Workspace, began: float) -> UnlearnOutcome:
    return UnlearnOutcome(
        status="never trained on",
        leaves=dict(work.leaves),
        best_round=0,
        records=[],
        before=None,
        after=None,
        thresholds={},
        start={},
        pairs={},
        exact=True,
        first_exposure=None,
        ignored=work.scope.ignored,
        client_seconds=0.0,
        seconds=time.monotonic() - began,
        request=request,
    )


class _Job:
    """One call of `unlearn`, after everything is loaded."""

    def __init__(
        self,
        request: UnlearnRequest,
        work: Workspace,
        exposure: int,
        progress: Callable[[RoundRecord], None],
        stop: Callable[[], bool],
        began: float,
    ) -> None:
        self.request, self.work, self.exposure = request, work, exposure
        self.progress, self.stop, self.began = progress, stop, began
        self.method: Method = get_method(request.method)
        self.records: list[RoundRecord] = []
        self.client_seconds = 0.0
        self.forget = work.data(work.scope.forget)
        self.retain: dict[str, ClientData] = {
            name: work.data(samples) for name, samples in work.scope.retain.items()
        }

    def run(self) -> UnlearnOutcome:
        work = self.work
        self.before = work.measure(work.leaves)
        unseen = work.unseen(work.leaves)
        self.thresholds: dict[str, float | None] = {
            "ma": unseen.ma,
            "el": unseen.el,
            "utility": self.request.utility_floor * self.before.utility,
        }
        if self.method.exact:
            return self._retrain()
        start = make_start(self.request, self.method, work, self.forget, self.retain)
        self.client_seconds += start.seconds
        status, leaves, best = self._rounds(start)
        pairs = change_pairs(work.edge, start.prepared, leaves) if start.prepared and best else {}
        return self._outcome(status, leaves, best, start.facts, pairs, exact=False)

    def _rounds(self, start: Start) -> tuple[Status, dict[str, Tensor], int]:
        request, work = self.request, self.work
        current, best, best_round, lowest = start.leaves, dict(work.leaves), 0, math.inf
        too_costly = False
        reference, refusal = self._reference(current)
        for number in range(1, request.rounds + 1):
            try:
                current, results = self._round(number, current, start, reference, refusal)
            except Interrupted:
                return "stopped", best, best_round
            except (TrainingDiverged, UpdateRefused):
                return "diverged", best, best_round
            probe = work.probe(current)
            record = self._record(number, request.rounds, probe, results, current)
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

    def _reference(self, leaves: Mapping[str, Tensor]) -> tuple[Reference | None, ClientData | None]:
        """The model before, for the methods whose loss looks back at it, and the refusals that some teach."""
        work = self.work
        if self.method.forget not in ("npo", "preference", "refusal") and self.method.retain != "kl":
            return None, None
        work.edge.load_travelling(leaves)
        refusal = refusals(self.forget, work.edge, work.features)
        return reference_of(work.edge, work.llm, self.forget, refusal), refusal

    def _round(
        self,
        number: int,
        leaves: dict[str, Tensor],
        start: Start,
        reference: Reference | None,
        refusal: ClientData | None,
    ) -> tuple[dict[str, Tensor], list[LocalResult]]:
        request, work = self.request, self.work
        owner = work.scope.owner
        spec, rule = spec_of(work.edge, work.config), create_rule("fedavg")
        state = rule.init(spec, current=leaves, round=number)
        results = []
        parties = sorted({owner, *self.retain})
        for name in parties:
            if self.stop():
                raise Interrupted(f"unlearning was asked to end in round {number}.")
            work.edge.load_travelling(leaves)
            mine = name == owner
            result = steps(
                work.edge,
                work.llm,
                self._settings(),
                retain=self.retain.get(name),
                moving=start.moving,
                seed=request.seed,
                client=name,
                round_number=number,
                method=self.method if mine else None,
                forget=self.forget if mine else None,
                refusal=refusal if mine else None,
                reference=reference if mine else None,
            )
            self.client_seconds += result.seconds
            update = Update(
                client=name,
                round=number,
                weight=float(max(1, len(parties) - 1)) if mine else 1.0,
                leaves=work.edge.travelling(),
                spec=spec.spec,
                basis=spec.basis,
            )
            validate(update, spec, round=number)
            state = rule.add(state, update)
            results.append(result)
        merged = rule.finish(state)
        # What nobody trained keeps its bits; the mean in fixed point may round the last one.
        still = {name: start.moving[name].to(leaf.device) for name, leaf in merged.items()}
        return {name: leaf.where(still[name], leaves[name]) for name, leaf in merged.items()}, results

    def _settings(self) -> LocalSettings:
        config, request = self.work.config, self.request
        return LocalSettings(
            steps=request.steps,
            batch_size=request.batch_size,
            learning_rate=request.learning_rate or config.learning_rate,
            optimizer=config.optimizer,
            clip_norm=config.clip_norm,
        )

    def _record(
        self,
        number: int,
        rounds: int,
        probe: Probe,
        results: list[LocalResult],
        leaves: Mapping[str, Tensor],
    ) -> RoundRecord:
        retain = [r.retain_loss for r in results if r.retain_loss is not None]
        floor, ma, el = (self.thresholds[name] for name in ("utility", "ma", "el"))
        assert floor is not None
        assert ma is not None
        forget = probe.forget
        short = forget.el is None or el is None
        payload = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())
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
            bytes=2 * payload * len(results),
        )

    def _retrain(self) -> UnlearnOutcome:
        work = self.work
        origin = starting_point(work.folder, self.exposure, work.untuned)
        leaves, best = origin[1], origin[0]
        try:
            for done in retrain(
                work.config,
                work.edge,
                work.llm,
                self.retain,
                participants(work.folder),
                origin,
                stop=self.stop,
            ):
                self.client_seconds += done.seconds
                leaves, best = done.leaves, done.round
                result = LocalResult(None, done.loss, 0, done.steps, done.seconds)
                record = self._record(done.round, work.config.rounds, work.probe(leaves), [result], leaves)
                self.records.append(record)
                self.progress(record)
        except Interrupted:
            return self._outcome("stopped", dict(work.leaves), 0, {}, {}, exact=False)
        except (TrainingDiverged, UpdateRefused):
            return self._outcome("diverged", dict(work.leaves), 0, {}, {}, exact=False)
        facts = {"from_round": origin[0], "first_exposure": self.exposure}
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
            after=self.before if unchanged else self.work.measure(leaves),
            thresholds=self.thresholds,
            start=facts,
            pairs=pairs,
            exact=exact,
            first_exposure=self.exposure,
            ignored=self.work.scope.ignored,
            client_seconds=self.client_seconds,
            seconds=time.monotonic() - self.began,
            request=self.request,
        )
