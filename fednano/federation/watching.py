"""Which round is the best so far, and whether it is worth going on.

The score is the clients' own where they judge between rounds (``evaluate-clients-every``): the mean accuracy on samples
that they hold out. Otherwise it is the server's on the test set, and then the figure of the round that was chosen by it is
too good by the choice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fednano.errors import RunError
from fednano.federation.exchange import exchange
from fednano.federation.ledger import judge_round
from fednano.federation.phase import Federation, PhaseResult
from fednano.aggregation import Rule
from fednano.federation.asking import instruct
from fednano.runs import RunFolder

__all__ = ["Watch", "judge_on_clients", "weighted"]

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
                "Restore the checkpoint, or start the run anew."
            )
        return found
