"""Which round is the best so far, and whether it is worth going on.

The score is the clients' own where they judge between rounds (``evaluate-clients-every``): the mean accuracy on
samples that they hold out. Otherwise it is the server's on the test set, and then the figure of the round that was
chosen by it is too good by the choice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from flwr.app import ArrayRecord

from fednano.aggregation import Rule
from fednano.errors import RunError
from fednano.federation.asking import instruct
from fednano.federation.exchange import Again, exchange
from fednano.federation.phase import Federation, PhaseResult
from fednano.runs import RunFolder

__all__ = ["Watch", "judge_on_clients", "judge_round", "mean_accuracy"]

_FILE = "watch.json"


@dataclass
class Watch:
    """The best round so far.

    Attributes:
        seen: the last round that was judged.
        best_round: the best one; 0 = none yet.
        accuracy: of the best round.
        loss: of the best round, where it is known; decides between equal accuracies.
        stale: judgements since then.
    """

    seen: int = 0
    best_round: int = 0
    accuracy: float = -1.0
    loss: float | None = None
    stale: int = 0

    def note(self, number: int, accuracy: float | None, loss: float | None) -> None:
        """Take a round's score into account; ``None``: the round was not judged."""
        self.seen = number
        if accuracy is None:
            return
        better = accuracy > self.accuracy
        if accuracy == self.accuracy and loss is not None and self.loss is not None:
            better = loss < self.loss
        if better:
            self.best_round, self.accuracy, self.loss, self.stale = number, accuracy, loss, 0
        else:
            self.stale += 1

    def save(self, folder: RunFolder) -> None:
        """Keep it in the run folder, in one step."""
        folder.write_json(_FILE, asdict(self))

    @classmethod
    def load(cls, folder: RunFolder, upto: int) -> Watch:
        """As it was saved last, for a run that goes on after round ``upto``."""
        if not folder.file(_FILE).exists():
            return cls()
        found = cls(**folder.read_json(_FILE))
        if found.seen > upto:
            raise RunError(
                f"{folder.file(_FILE)} has judged round {found.seen}, but the newest checkpoint is of round {upto}. "
                "Restore the checkpoint, or delete that file to go on without what it knows of the best round."
            )
        return found


def judge_round(
    fed: Federation,
    phase: str,
    number: int,
    result: PhaseResult,
    record: dict[str, object],
    *,
    rule: Rule | None = None,
    watch: Watch | None = None,
) -> None:
    """Judge a round where one is due, on the server and on the clients, and write its line.

    Args:
        fed: the federation.
        phase: the phase.
        number: the round.
        result: what to judge.
        record: what the line says already.
        rule: merged the round; without it clients are not asked.
        watch: told the score.
    """
    config = fed.config
    accuracy: float | None = None
    loss: float | None = None
    if config.evaluate_every and number % config.evaluate_every == 0:
        samples = fed.evaluator.samples(config.evaluate_samples)
        judged = fed.evaluator.judge(result.tuned, samples)
        record |= {"accuracy": judged.accuracy, "loss": judged.loss, "samples": len(samples)}
        record["scores"] = judged.scores
        fed.view.evaluation(
            *(phase, number),
            accuracy=judged.accuracy,
            loss=judged.loss,
            samples=len(samples),
            metric=fed.evaluator.title,
        )
        accuracy, loss = judged.accuracy, judged.loss
    if config.evaluate_clients_every and rule is not None:
        accuracy = loss = None
        if number % config.evaluate_clients_every == 0:
            scores = judge_on_clients(fed, phase, rule, number, result)
            if scores:
                accuracy = mean_accuracy(scores)
                record["client_accuracy"] = accuracy
    fed.folder.append_metrics(record)
    if watch is not None:
        watch.note(number, accuracy, loss)
        watch.save(fed.folder)


def judge_on_clients(
    fed: Federation, phase: str, rule: Rule, number: int, result: PhaseResult, *, final: bool = False
) -> list[tuple[float, int]]:
    """Let every client judge the merged adapters, with what is personal, on its own held-out samples.

    Returns:
        Accuracy and number of samples of each client that could.
    """
    shared: dict[int, ArrayRecord] = {}
    told = instruct(fed, phase, rule, number, result, list(fed.nodes))
    asked = {name: (fed.nodes[name], told[name].to_records(shared)) for name in told}
    deliveries = exchange(
        fed.grid,
        asked,
        message_type="evaluate",
        group="evaluate" if final else f"evaluate-{phase}-{number}",
        timeout=fed.config.round_timeout,
        stop=fed.stop,
        again=Again(lambda name: told[name].to_records(), fed.config.rejoin_timeout),
    )
    scores = []
    for delivery in sorted(deliveries, key=lambda delivery: delivery.client):
        reply = delivery.reply
        if reply.failure is not None or not {"accuracy", "samples"} <= set(reply.metrics):
            why = reply.failure.message if reply.failure else "its reply lacks accuracy or samples"
            fed.view.message(f"{delivery.client} could not evaluate: {why}", "warning")
            fed.folder.append_event("warning", f"{delivery.client} could not evaluate: {why}")
            continue
        record: dict[str, object] = {
            "phase": phase,
            "round": number,
            "scope": "client",
            "client": delivery.client,
            "accuracy": reply.metrics["accuracy"],
            "samples": int(reply.metrics["samples"]),
        }
        own = {k.removeprefix("score-"): v for k, v in reply.metrics.items() if k.startswith("score-")}
        record |= {"scores": own} if own else {}
        fed.folder.append_metrics(record | ({"final": True} if final else {}))
        scores.append((reply.metrics["accuracy"], int(reply.metrics["samples"])))
    return scores


def mean_accuracy(scores: list[tuple[float, int]]) -> float:
    """Mean over the samples of all clients."""
    return sum(accuracy * count for accuracy, count in scores) / sum(count for _, count in scores)
