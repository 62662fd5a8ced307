"""One run on the server, from the first hello to the report.

Nothing here computes: phases are run by :mod:`fednano.federation.rounds`, merging is :mod:`fednano.aggregation`'s,
judging :mod:`fednano.federation.evaluator`'s. This module puts them in order and makes sure that whatever happens, what
was done is on disk and every process that was started is gone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

from flwr.serverapp import Grid

from fednano.aggregation import Rule
from fednano.errors import FednanoError, Interrupted
from fednano.federation.baselines import BaselineResult, build_rule, check_rule, other_rule, run_baselines
from fednano.federation.config import RunConfig
from fednano.federation.enrolled import auditor_of, enrolled, place_of
from fednano.federation.evaluator import Evaluator
from fednano.federation.exchange import Stop, wait_for_nodes
from fednano.federation.faults import check_faults, parse_faults
from fednano.federation.forgetting import (
    ForgettingGrid,
    check_no_commit,
    resume_point,
    start_leaves,
    start_tombstones,
)
from fednano.federation.gathering import settle_basis
from fednano.federation.hosting import open_host
from fednano.federation.introduction import Introduced, introduce, remind
from fednano.federation.judging import judge_all, judge_start
from fednano.federation.messages import HostTicket
from fednano.federation.misbehaviour import assign
from fednano.federation.model import build_edge, connect, gathers, settled, use_threads
from fednano.federation.outcome import write_outcome
from fednano.federation.rounds import MAIN_PHASE, Federation, PhaseResult, run_rounds
from fednano.federation.schedules import fit_rank
from fednano.federation.specification import spec_of
from fednano.federation.watching import judge_on_clients, mean_accuracy
from fednano.models.edge import NanoEdge
from fednano.runs import RunFolder, RunInfo, RunView, make_view
from fednano.runs.text import ZERO_SHOT
from fednano.tracking import make_trackers, tracked

__all__ = ["run_server", "spec_of"]


_NOT_REPEATED = ("runs-dir", "track", "resume", "cache-dir", "host-address", "server-dir")
_Error = TypeVar("_Error", FednanoError, Interrupted)


def run_server(
    grid: Grid, config: RunConfig, *, view: RunView | None = None, stop: Stop | None = None
) -> Path:
    """Run the whole job on clients reached through ``grid``.

    Args:
        grid: Flower's connection to the clients.
        config: the run's settings.
        view: what the user sees; by default chosen from the terminal.
        stop: lets somebody else end the run early.

    Returns:
        The run folder.

    Raises:
        FednanoError: the run cannot start or go on; the run folder keeps what was done.
        Interrupted: ``stop`` was set; the run folder keeps what was done.
    """
    stop = stop or Stop()
    trackers = make_trackers(
        config.track
    )  # before there is a folder: one that is not installed is told at once
    folder, config = _open_folder(config)
    view = tracked(view or make_view(), trackers, config.to_mapping())
    try:
        with ExitStack() as stack:
            stack.callback(folder.close)
            sites = stack.enter_context(enrolled(grid, config, folder))
            _run(sites, config, folder, view, stop, stack)
    except Interrupted as error:
        error.args = (f"{error} {_kept(folder)}",)
        raise _ended(error, folder, view)  # noqa: B904 - it is the same error
    except FednanoError as error:
        if folder.checkpoints():
            error.args = (f"{error} {_kept(folder)}",)
        raise _ended(error, folder, view)  # noqa: B904 - it is the same error
    return folder.path


def _kept(folder: RunFolder) -> str:
    rounds = folder.checkpoints()
    upto = f"up to round {rounds[-1]}" if rounds else "up to here"
    return f"Everything {upto} is kept in {folder.path}; continue with: fednano simulate --resume {folder.path.name}"


def _ended(error: _Error, folder: RunFolder, view: RunView) -> _Error:
    """Write down and show why a run ended early; the command line need not say it again."""
    with suppress(FednanoError):  # a full disk, which may be what ended it; then it is shown only
        folder.append_event("error", str(error))
    folder.close()
    view.finish(error=str(error))
    error.shown = True
    return error


def _open_folder(config: RunConfig) -> tuple[RunFolder, RunConfig]:
    if not config.resume:
        config = settled(config)
        name = f"{Path(config.dataset).name}-{config.adapter}-{config.rule}"
        if config.start_from:  # by path, since 'latest' is another run in a moment
            parent = RunFolder.open(config.start_from, root=config.runs_dir)
            config = config.changed(start_from=str(parent.path))
        if config.server_dir:
            config = config.changed(server_dir=str(Path(config.server_dir).absolute()))
        folder = RunFolder.create(config.runs_dir, name, config.to_mapping(), command=repeat_command(config))
        if config.start_from:
            start_tombstones(config, folder)
    else:
        folder = RunFolder.open(config.resume, root=config.runs_dir)
        check_no_commit(folder.path)
        before = config_of(folder)
        given = {name: getattr(config, name) for name in ("resume", "runs_dir", "host_address", "track")}
        # What decides the result comes from the run itself: a resumed run must end at the same bits.
        config = before.changed(**given)
    cache = config.cache_dir or str(folder.path / "cache")
    return folder, config.changed(cache_dir=str(Path(cache).absolute()))


def config_of(folder: RunFolder) -> RunConfig:
    """The settings that a run was started with."""
    recorded = folder.config()
    return RunConfig.from_mapping({k: v for k, v in recorded.items() if k not in ("created", "command")})


def repeat_command(config: RunConfig) -> list[str]:
    """The command line that repeats a run: every setting that differs from its default."""
    words = ["fednano", "simulate"]
    default = RunConfig().to_mapping()
    for name, value in config.to_mapping().items():
        if value == default[name] or name in _NOT_REPEATED:
            continue
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def _run(
    grid: Grid, config: RunConfig, folder: RunFolder, view: RunView, stop: Stop, stack: ExitStack
) -> None:
    began = time.monotonic()
    use_threads(config)
    rule = build_rule(config, config.rule)
    view.start(
        RunInfo(
            run_id=folder.path.name,
            path=folder.path,
            model=config.model,
            dataset=config.dataset,
            adapter=config.adapter,
            rule=config.rule,
            clients=config.clients,
            seed=config.seed,
            phases={ZERO_SHOT: 0, MAIN_PHASE: config.rounds},
        )
    )
    # The host loads its model while this process loads the edge and the clients load theirs.
    host = stack.enter_context(ExitStack())
    starter = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="host-start"))
    starting = starter.submit(
        host.enter_context, open_host(config, view, folder.path / "host.log", folder.id)
    )
    edge = build_edge(config)
    check_rule(rule, spec_of(edge, config), config)
    if config.baselines:  # refused now, not after hours of training
        check_rule(build_rule(config, other_rule(config)), spec_of(edge, config), config)
    nodes = wait_for_nodes(grid, config.clients, config.join_timeout, stop)
    grid = ForgettingGrid(grid, folder.path)
    clients = introduce(grid, nodes, config, edge.travelling(), edge, stop)
    clients = remind(grid, clients, config, edge, folder, stop)
    by_name = {name: client.node for name, client in clients.items()}
    ticket = starting.result()
    if gathers(config):
        edge = settle_basis(grid, by_name, config, ticket, edge, folder, stop)
    start = edge.travelling()
    place = place_of(config.to_mapping())
    llm = stack.enter_context(connect(config, ticket, place.credentials if place else None))
    auditor = auditor_of(config.to_mapping())
    for name, client in clients.items():
        samples = int(client.hello.metrics["samples"])
        auditor.record("joined", run=folder.id, site=name, node=str(client.node), samples=samples)
    evaluator = Evaluator(config, edge, llm, Path(config.cache_dir))
    config = config.changed(metric=evaluator.metric)  # clients judge by the same
    fed = Federation(
        grid=grid,
        nodes=by_name,
        config=config,
        ticket=ticket,
        spec=spec_of(edge, config),
        folder=folder,
        view=view,
        stop=stop,
        evaluator=evaluator,
        simulated=all(client.hello.facts.get("simulated") == "True" for client in clients.values()),
        basis=edge.basis_fingerprint() if gathers(config) else "",
        edge=edge.edge.fingerprint,
        seeded=start,
        nano=edge,
        auditor=auditor,
    )
    _tell_faults(fed)
    _tell_bad_rows(fed, clients)
    _write_partition(folder, config, clients)
    zero_shot = judge_start(fed, start)
    first = start_leaves(config, edge) if config.start_from else start
    resumed = resume_point(folder, first) if config.resume else PhaseResult(first)
    view.phase_started(MAIN_PHASE, config.rounds)
    phase_began = time.monotonic()
    result = run_rounds(fed, MAIN_PHASE, rule, resumed)
    seconds = time.monotonic() - phase_began
    fit_rank(edge, result.leaves)
    folder.save_adapter(result.tuned, _adapter_info(config, edge, ticket))
    zero_shot = zero_shot or judge_all(fed, ZERO_SHOT, 0, start)
    final = judge_all(fed, MAIN_PHASE, result.rounds, result.tuned)
    baselines = _judge_clients(fed, rule, result)
    baselines |= run_baselines(fed, start) if config.baselines else {}
    write_outcome(
        fed,
        edge=edge,
        zero_shot=zero_shot,
        final=final,
        result=result,
        phase_seconds=seconds,
        baselines=baselines,
        wall_seconds=time.monotonic() - began,
    )


def _tell_faults(fed: Federation) -> None:
    """Say which clients misbehave, where a simulation wants some to.

    Raises:
        ConfigError: the clients are real sites, or no honest one would be left.
    """
    faults = parse_faults(fed.config.faults)
    check_faults(faults, len(fed.nodes), simulated=fed.simulated)
    for fault in faults:
        told = assign(
            [f for f in faults if f.kind != "vanish"], list(fed.nodes), seed=fed.config.seed, round_number=0
        )
        who = ", ".join(sorted(client for client, what in told.items() if what == str(fault)))
        fed.folder.append_event("warning", f"simulated fault {fault}: {who or 'other clients each round'}")


def _tell_bad_rows(fed: Federation, clients: Mapping[str, Introduced]) -> None:
    """Rows that were left out are told, never dropped in silence."""
    found: dict[str, tuple[int, str]] = {}
    for name, client in clients.items():
        if "bad-rows" in client.hello.facts:
            found[client.hello.facts["bad-rows"]] = (int(client.hello.metrics["bad-rows"]), name)
    if fed.evaluator.bad_rows:
        shown = "; ".join(str(row) for row in fed.evaluator.bad_rows[:3])
        found[shown] = (len(fed.evaluator.bad_rows), "the test set")
    for shown, (count, where) in found.items():
        text = f"{count} bad rows were left out ({where}): {shown}"
        fed.view.message(text, "warning")
        fed.folder.append_event("warning", text)


def _write_partition(folder: RunFolder, config: RunConfig, clients: Mapping[str, Introduced]) -> None:
    counts = {
        name: json.loads(c.hello.facts["labels"]) for name, c in clients.items() if "labels" in c.hello.facts
    }
    labels = sorted({label for own in counts.values() for label in own})
    simulated = all(c.hello.facts.get("simulated") == "True" for c in clients.values())
    folder.write_json(
        "partition.json",
        {
            "kind": config.partition if simulated else "sites",
            "alpha": config.alpha,
            "labels": labels,
            "counts": {name: [own.get(label, 0) for label in labels] for name, own in counts.items()},
            "samples": {name: int(c.hello.metrics["samples"]) for name, c in clients.items()},
        },
    )


def _judge_clients(fed: Federation, rule: Rule, result: PhaseResult) -> dict[str, BaselineResult]:
    """Let every client judge the merged adapters, with what is personal, on its own held-out samples.

    Returns:
        The clients' mean where the rule leaves them personal adapters: the server cannot judge these.
    """
    if fed.config.holdout == 0:
        return {}
    began = time.monotonic()
    scores = judge_on_clients(fed, MAIN_PHASE, rule, result.rounds, result, final=True)
    if not scores or not {"personal", "personal_adapter"} & set(rule.client_config(result.rounds)):
        return {}
    note = f"{len(scores)} clients, each with its own adapter on samples it held out, not on the test set"
    lowest, highest = min(scores)[0], max(scores)[0]
    return {
        "personalised": BaselineResult(
            mean_accuracy(scores), None, result.rounds, time.monotonic() - began, note, (lowest, highest)
        )
    }


def _adapter_info(config: RunConfig, edge: NanoEdge, ticket: HostTicket) -> dict[str, object]:
    return {
        "config": config.to_mapping(),
        "spec": edge.spec(),
        "basis": edge.basis_fingerprint(),
        "edge": edge.edge.fingerprint,
        "language": ticket.fingerprint,
    }
