"""The round loop: pick clients, send leaves, merge what comes back, check it in, judge it, write it down."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

from fednano.aggregation import Rule, Spec
from fednano.errors import RunError, UpdateRefused
from fednano.federation.alone import run_pooled, run_separate
from fednano.federation.asking import ask, instruct, sample_clients, take_in
from fednano.federation.config import RunConfig
from fednano.federation.exchange import Outstanding
from fednano.federation.forgetting import catch_up
from fednano.federation.ledger import (
    failure_of,
    give_up,
    mean_loss,
    record_client,
    round_record,
    save_round,
)
from fednano.federation.phase import MAIN_PHASE, Federation, Leaves, Merge, PhaseResult, WireTotals
from fednano.federation.private import add_noise, bounded, cannot_afford, epsilon_so_far
from fednano.federation.resurfacing import probe_forgotten
from fednano.federation.schedules import at_rank, rank_at
from fednano.federation.secure import merge_securely
from fednano.federation.specification import spec_of
from fednano.federation.watching import Watch, judge_round

__all__ = [
    "MAIN_PHASE",
    "Federation",
    "Leaves",
    "PhaseResult",
    "WireTotals",
    "run_pooled",
    "run_rounds",
    "run_separate",
    "sample_clients",
]


def run_rounds(fed: Federation, phase: str, rule: Rule, start: PhaseResult) -> PhaseResult:
    """Federated training: the rounds after ``start.rounds`` up to ``config.rounds``.

    A round with fewer valid updates than ``min-replies`` keeps its starting leaves. After each round a checkpoint is
    written before anything else happens.

    Raises:
        RunError: every client fails for the same reason two rounds running, so going on is pointless.
        Interrupted: the run was asked to end.
    """
    result, first, barren, config = start, start.rounds + 1, 0, fed.config
    result.remember(rule, fed.spec, result.memory)
    _catch_up(fed, phase, rule, result)
    watch = Watch.load(fed.folder, start.rounds) if phase == MAIN_PHASE and _watched(config) else None
    if watch is not None and watch.seen < start.rounds:  # killed between its checkpoint and its judgement
        record: dict[str, object] = {"phase": phase, "round": start.rounds, "scope": "global"}
        judge_round(fed, phase, start.rounds, result, record, rule=rule, watch=watch)
    outstanding = Outstanding()
    origins: dict[int, Leaves] = {}
    for number in range(first, config.rounds + 1):
        if why := _enough(fed, watch, number):
            _say(fed, f"stopped after round {result.rounds}: {why}", "info")
            break
        _catch_up(fed, phase, rule, result)
        fed = _at_scheduled_rank(fed, result, number)
        origins = {asked: leaves for asked, leaves in origins.items() if outstanding.holds(asked)}
        origins[number] = result.leaves
        began, wire = time.monotonic(), WireTotals()
        done = _one_round(fed, phase, rule, number, result, wire, outstanding, origins)
        kept = _settle(rule, fed.spec, done, result, config.min_replies)
        if kept:
            _say(fed, f"{phase}, round {number}: {kept}; the adapters stay as they were.", "warning")
        barren = 0 if done.merged else barren + 1
        result.loss = mean_loss(done.losses)
        result.rounds = number
        result.wire.add(wire)
        save_round(fed, phase, number, result)
        record = round_record(fed, phase, number, result, wire, time.monotonic() - began)
        record |= _details(fed, phase, number, done, result)
        judge_round(fed, phase, number, result, record, rule=rule, watch=watch)
        reasons = done.failures.values()
        unreachable = bool(reasons) and all(text.startswith("HostUnavailable") for text in reasons)
        if reasons and all(text.startswith("BudgetSpent") for text in reasons) and not done.merged:
            _say(fed, f"stopped after round {number}: every client has spent its privacy budget.", "info")
            break
        if reasons and not done.merged and (barren >= 2 or number == first or unreachable):
            if _catch_up(fed, phase, rule, result):  # no wonder: samples were forgotten while they trained
                barren = 0
                continue
            give_up(number, done.failures)
    _catch_up(fed, phase, rule, result)
    if watch is not None and config.keep == "best" and watch.best_round not in (0, result.rounds):
        saved = fed.folder.load_checkpoint(watch.best_round)
        best = PhaseResult.of_checkpoint(saved.tensors, saved.state)
        if best.epoch != result.epoch:
            _say(
                fed, f"round {watch.best_round} was the best, but it knew samples that are forgotten.", "info"
            )
            return result
        result.leaves = best.leaves
        result.remember(rule, fed.spec, best.memory)
        _say(fed, f"kept the adapters of round {watch.best_round}, the best of {result.rounds}.", "info")
    return result


def _catch_up(fed: Federation, phase: str, rule: Rule, result: PhaseResult) -> bool:
    """Go on from the committed adapter if samples were forgotten in the meantime; tells whether they were."""
    main = phase == MAIN_PHASE
    if not catch_up(fed.folder, result, fed.stop, main=main, patience=fed.config.round_timeout):
        return False
    result.remember(rule, fed.spec, {})
    _say(fed, "samples were forgotten: going on from the committed adapter.", "info")
    return True


def _enough(fed: Federation, watch: Watch | None, number: int) -> str:
    """Why a round is not begun; empty where it is."""
    least = fed.config.early_stop
    if watch is not None and least and watch.stale >= least:
        return f"no better round for {watch.stale} judgements."
    return cannot_afford(fed.config, fed.nodes, number)


def _details(fed: Federation, phase: str, number: int, done: Merge, result: PhaseResult) -> dict[str, object]:
    """What the line of a round says of its merge, of privacy, and of forgotten samples."""
    found: dict[str, object] = {"merge": done.state.report} if done.state.report else {}
    if fed.config.dp != "off":
        found |= epsilon_so_far(fed, phase, number)
    return found | probe_forgotten(fed, phase, number, result.tuned) if phase == MAIN_PHASE else found


def _watched(config: RunConfig) -> bool:
    return bool(config.early_stop) or config.keep == "best"


def _say(fed: Federation, text: str, level: str) -> None:
    fed.view.message(text, level)
    fed.folder.append_event(level, text)


def _at_scheduled_rank(fed: Federation, result: PhaseResult, number: int) -> Federation:
    """Bring the adapters to the rank that a round wants; returns the federation that expects it of updates."""
    if not fed.config.rank_steps or fed.nano is None:
        return fed
    spec = spec_of(fed.nano, fed.config, result.leaves)
    rank = rank_at(fed.config, number)
    if any(spec.rank(site) != rank for site in spec.products) or not spec.products:
        result.leaves = at_rank(fed.nano, spec, result.leaves, rank)
        spec = spec_of(fed.nano, fed.config, result.leaves)
    return replace(fed, spec=spec)


def _settle(rule: Rule, spec: Spec, done: Merge, result: PhaseResult, least: int) -> str:
    """Put a round's merge into effect. Returns why it was not, where it could not be; empty otherwise."""
    if len(done.merged) < least:
        return f"{len(done.merged)} valid updates, fewer than min-replies {least}" if done.merged else ""
    try:
        leaves = rule.finish(done.state)
    except RunError as error:  # such as fewer updates than a robust rule needs
        done.failures["the merge"] = str(error)
        done.merged.clear()
        return str(error)
    result.leaves = leaves
    result.remember(rule, spec, rule.memory(done.state))
    result.accepted = {**result.accepted, **done.merged}
    return ""


def _one_round(
    fed: Federation,
    phase: str,
    rule: Rule,
    number: int,
    result: PhaseResult,
    wire: WireTotals,
    outstanding: Outstanding,
    origins: Mapping[int, Leaves],
) -> Merge:
    """Ask clients, and merge what comes back, until all have answered, enough have, or the deadline has passed."""
    config = fed.config
    if config.secure_aggregation:
        return merge_securely(fed, phase, rule, number, result, wire)
    chosen = sample_clients(config, list(fed.nodes), number, config.over_select)
    if config.late == "buffer":  # one job at a time: who still works on an older one is left to it
        chosen = [client for client in chosen if not outstanding.busy(client)] or chosen
    wanted = config.participants(len(fed.nodes)) if config.over_select else len(fed.nodes) + 1
    merge = Merge(rule.init(fed.spec, current=result.leaves, memory=result.memory, round=number))
    fed.view.round_started(number, chosen)
    instructions = instruct(fed, phase, rule, number, result, chosen)
    with closing(ask(fed, phase, number, instructions, wire, outstanding)) as deliveries:
        for delivery in deliveries:
            reason = failure_of(delivery)
            if reason is None:
                try:
                    update = take_in(fed, rule, delivery, number, result.leaves, origins)
                    if config.dp == "client":
                        update = bounded(update, result.leaves, config)
                    merge.state = rule.add(merge.state, update)
                    if "loss" in delivery.reply.metrics:
                        merge.losses.append((delivery.client, delivery.reply.metrics["loss"], update.weight))
                    merge.merged[delivery.client] = delivery.asked
                except UpdateRefused as error:
                    reason = str(error)
                    if getattr(error, "reason", "") == "norm":
                        reason += ". Lower the learning rate, or raise max-abs or max-norm."
            if reason is not None and delivery.asked == number:
                merge.failures[delivery.client] = reason
            record_client(fed, phase, number, delivery, reason)
            if len(merge.merged) >= wanted:
                break
    if config.dp == "client" and merge.merged:
        add_noise(merge.state, config)
    return merge
