"""What training must do about forgotten samples: tell each client its tombstones, and merge nothing that ignores them.

:class:`ForgettingGrid` stands between the server and Flower. Every request that passes carries the tombstones of the
client it goes to; a reply that was made without them, or before the newest unlearning commit, becomes a refusal. So no
phase of a run, and no later one, can forget to ask.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fednano.errors import Interrupted, RunError, UpdateRefused
from fednano.federation.messages import Reply, tombstone_record
from fednano.federation.passing import PassingGrid
from fednano.runs import RunFolder
from fednano.runs.tombstones import Tombstones, commit_pending, read_tombstones, write_tombstones

if TYPE_CHECKING:
    from fednano.federation.config import RunConfig
    from fednano.federation.exchange import Stop
    from fednano.federation.phase import PhaseResult
    from fednano.models.edge import NanoEdge

__all__ = [
    "ForgettingGrid",
    "catch_up",
    "check_no_commit",
    "committed_leaves",
    "resume_point",
    "start_leaves",
    "start_tombstones",
]


class ForgettingGrid(PassingGrid):
    """A grid whose requests carry tombstones and whose replies must honour them.

    Args:
        inner: Flower's grid.
        run: the run folder, whose tombstones are read anew whenever they change.
    """

    def __init__(self, inner: Grid, run: Path) -> None:
        super().__init__(inner)
        self._folder = run
        self._sites: dict[int, str] = {}
        self._simulated = False

    def know(self, sites: Mapping[str, int], *, simulated: bool) -> list[str]:
        """Learn which node is whose.

        Args:
            sites: client name to node id.
            simulated: the clients hold parts of one data set and run on one machine; then a sample may stand at
                another client than its owner, and all are told everything.

        Returns:
            The clients that have something to forget.
        """
        self._sites, self._simulated = {node: name for name, node in sites.items()}, simulated
        return [name for name, node in sites.items() if self._due(node).sets]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, with their clients' tombstones."""
        return self._inner.push_messages([self._told(message) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are ready, checked."""
        return [self._checked(message) for message in self._inner.pull_messages(message_ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages, with tombstones, and wait for all replies, checked."""
        replies = self._inner.send_and_receive([self._told(m) for m in messages], timeout=timeout)
        return [self._checked(message) for message in replies]

    def _due(self, node: int) -> Tombstones:
        known = read_tombstones(self._folder)
        return known if self._simulated else known.for_site(self._sites.get(node, ""))

    def _told(self, message: Message) -> Message:
        due = self._due(message.metadata.dst_node_id)
        if due.epoch:
            message.content["tombstones"] = tombstone_record(due)
        return message

    def _checked(self, message: Message) -> Message:
        due = self._due(message.metadata.src_node_id)
        if not due.epoch or message.has_error():
            return message
        try:
            reply = Reply.from_records(message.content)
        except UpdateRefused:
            return message  # whoever reads it says what is wrong with it
        used = reply.facts.get("tombstones", "")
        if reply.failure is None and used != due.digest:
            epoch = used.partition(":")[0] or "none"
            error = UpdateRefused(
                f"it was made with the tombstones of epoch {epoch}, those of epoch {due.epoch} are in force: it may "
                "hold forgotten samples. Update the client if this comes again."
            )
            message.content = Reply.failed(reply.client, reply.round, error).to_records()
        return message


def check_no_commit(run: Path) -> None:
    """Raise RunError while an unlearning commit of the run is unfinished."""
    if commit_pending(run):
        raise RunError(
            f"an unlearning commit of run {run.name} is under way or was cut off. Finish it first: fednano unlearn run "
            f"--run {run.name}"
        )


def committed_leaves(folder: RunFolder) -> dict[str, Tensor]:
    """The leaves of the run's adapter as the last unlearning commit left it.

    Raises:
        RunError: the adapter is damaged, or holds residuals, from which training cannot go on.
    """
    leaves, _ = folder.load_adapter()
    if any(name.startswith("beside/") for name in leaves):
        raise RunError(
            f"the adapter of run {folder.id} has residuals beside the frozen model, which the merge rule "
            "must remember; training cannot go on from the adapter alone. Start a new run with another rule."
        )
    return leaves


def catch_up(folder: RunFolder, result: PhaseResult, stop: Stop, *, main: bool, patience: float) -> bool:
    """Go on from the committed adapter if samples were forgotten since ``result`` was made.

    Args:
        folder: the run.
        result: what training has reached; its leaves are replaced, what the merge rule remembers is dropped.
        stop: ends the wait for a commit that is under way.
        main: whether this is the run's main phase; a baseline cannot go on.
        patience: seconds to wait for a commit that is under way.

    Returns:
        Whether it was replaced.

    Raises:
        RunError: a commit does not end, or a baseline was overtaken by one.
        Interrupted: the run was asked to end.
    """
    until = time.monotonic() + patience
    while commit_pending(folder.path):
        if time.monotonic() > until:
            check_no_commit(folder.path)
        if stop.wait(0.2):
            raise Interrupted(stop.reason)
    epoch = read_tombstones(folder.path).epoch
    if result.epoch < 0:
        result.epoch = epoch
    if epoch == result.epoch:
        return False
    if not main:
        raise RunError(
            "samples were forgotten while a baseline was training on them. Run the baselines again."
        )
    result.leaves, result.memory, result.beside = committed_leaves(folder), {}, {}
    result.accepted, result.epoch = {}, epoch
    return True


def start_tombstones(config: RunConfig, folder: RunFolder) -> None:
    """Take over the tombstones of the run that a new one starts from. Raises RunError where there is no such run."""
    parent = RunFolder.open(config.start_from, root=config.runs_dir)
    check_no_commit(parent.path)
    tombstones = read_tombstones(parent.path)
    if tombstones.epoch:
        write_tombstones(folder.path, tombstones)


def start_leaves(config: RunConfig, edge: NanoEdge) -> dict[str, Tensor]:
    """The leaves of the run that a new one starts from.

    Raises:
        RunError: there is no such run, or its adapter does not fit this run's model and adapter.
    """
    parent = RunFolder.open(config.start_from, root=config.runs_dir)
    check_no_commit(parent.path)
    _, info = parent.load_adapter()
    expected = {"edge": edge.edge.fingerprint, "spec": edge.spec(), "basis": edge.basis_fingerprint()}
    for name, here in expected.items():
        if info.get(name) != here:
            raise RunError(
                f"run {parent.id} cannot be started from: its {name} is {str(info.get(name))[:40]!r}, here it is "
                f"{here[:40]!r}. Use the same model, adapter, rank, streams and seed."
            )
    return committed_leaves(parent)


def resume_point(folder: RunFolder, start: dict[str, Tensor]) -> PhaseResult:
    """Where a resumed run goes on; from ``start`` when it had not finished a round.

    A checkpoint of before the newest unlearning commit is only counted by: training goes on from the committed adapter.

    Raises:
        RunError: a commit is unfinished, or the checkpoint is another adapter's.
    """
    from fednano.federation.phase import PhaseResult

    check_no_commit(folder.path)
    epoch = read_tombstones(folder.path).epoch
    if not folder.checkpoints():
        if not epoch or not (folder.path / "adapter.json").exists():
            return PhaseResult(start)
        # its checkpoints are purged
        done = max(
            (int(row["round"]) for row in folder.metrics() if row.get("phase") == "federated"), default=0
        )
        return PhaseResult(committed_leaves(folder), rounds=done, epoch=epoch)
    saved = folder.load_checkpoint()
    result = PhaseResult.of_checkpoint(saved.tensors, saved.state)
    if set(result.leaves) != set(start):
        raise RunError(
            f"the checkpoint of round {saved.round} holds the leaves {sorted(result.leaves)}, this adapter has "
            f"{sorted(start)}. Resume with the settings the run was started with."
        )
    return result
