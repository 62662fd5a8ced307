"""A finished run, loaded to unlearn from: model, adapter, everybody's samples, and the questions to measure by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torch import Tensor

from fednano.data import Sample
from fednano.errors import ConfigError, DataError, RunError
from fednano.federation.answer import tuned_edge
from fednano.federation.config import RunConfig
from fednano.federation.messages import HostTicket
from fednano.federation.model import connect, load_data, use_threads
from fednano.federation.server import config_of
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel, LocalLLM
from fednano.runs import RunFolder
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.unlearning.measure import (
    Measurement,
    Perturbed,
    SetScores,
    mean_probability,
    measure_site,
    score_set,
)
from fednano.unlearning.metrics import exact_memorisation, probability
from fednano.unlearning.probe import require_local, token_scores
from fednano.unlearning.sites import Scope, SiteData, simulated_sites, some, split_scope, withhold

__all__ = ["Probe", "Workspace", "utility_of"]


@dataclass(frozen=True)
class Probe:
    """What is looked at after each round.

    Attributes:
        forget: scores of the forget set.
        utility: see `Measurement`.
        accuracy: see `Measurement`.
    """

    forget: SetScores
    utility: float
    accuracy: float


class Workspace:
    """One run and one scope.

    Args:
        run: a run's id, folder or ``"latest"``.
        owner: the site whose samples are forgotten.
        ids: their ids.
        runs_dir: folder of the run folders.
        sites: site to its samples; by default the simulated ones of the run.
        perturbed: sample id to other answers, for truth ratios.
        seed: of what is sampled to measure by.
        withheld: ids of the owner's that nothing is to be learnt from either, though no round has trained on them.

    Raises:
        RunError: there is no such run, it has not finished, or its base model is another one now.
        DataError: the scope cannot be forgotten; see `split_scope`.
        ConfigError: the run's merge rule left more than the adapter's own leaves.
    """

    def __init__(
        self,
        run: str | Path,
        owner: str,
        ids: Sequence[str],
        *,
        runs_dir: str | Path = "runs",
        sites: Mapping[str, SiteData] | None = None,
        perturbed: Mapping[str, Perturbed] | None = None,
        seed: int = 0,
        withheld: Sequence[str] = (),
    ) -> None:
        self.folder = RunFolder.open(run, root=runs_dir)
        self.leaves, info = self.folder.load_adapter()
        settings = config_of(self.folder)
        self.sites = sites if sites is not None else simulated_sites(self.folder, settings)
        self.scope: Scope = withhold(split_scope(self.sites, owner, ids), withheld)
        self.perturbed, self.seed = perturbed, seed
        use_threads(settings)
        self.config: RunConfig
        self.edge: NanoEdge
        self.config, self.edge = tuned_edge(self.folder, untuned=True)
        self.untuned = self.edge.travelling()
        if {n: v.shape for n, v in self.leaves.items()} != {n: v.shape for n, v in self.untuned.items()}:
            raise ConfigError(
                f"run {self.folder.id} ended with more than its adapter ({', '.join(sorted(self.leaves))}), as merge "
                f"rule {self.config.rule!r} leaves it. Only a new run without the samples can forget them."
            )
        self.edge.load_travelling(self.leaves)
        self._stack = ExitStack()
        self.llm: LocalLLM = require_local(
            self._stack.enter_context(connect(self.config, HostTicket())), "unlearning from a run folder"
        )
        if info.get("language") and info["language"] != self.llm.part.fingerprint:
            self.close()
            raise RunError(
                f"run {self.folder.id} was tuned against another language model (weights "
                f"{str(info['language'])[:16]}, here {self.llm.part.fingerprint[:16]}). Restore that model."
            )
        cache = Path(self.config.cache_dir) if self.config.cache_dir else self.folder.path / "cache"
        self.features = FeatureCache(self.edge.edge, cache)
        self._tests = some(list(load_data(self.config, "test")), seed, "test")
        self._unseen = some(
            [*self.scope.held_out[owner], *self._tests],
            seed,
            "unseen",
            most=max(32, len(self.scope.forget)),
            shuffle=False,
        )
        if not self._unseen:
            raise DataError("there are no samples that the run never trained on; the stop rule needs some.")

    def close(self) -> None:
        """Let go of the model."""
        self._stack.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def data(self, samples: Sequence[Sample]) -> ClientData:
        """Samples, ready to ask about."""
        return ClientData(samples, self.edge, self.features)

    def unseen(self, count: int) -> list[Sample]:
        """Up to so many samples that no round has trained on; the owner's own first."""
        return self._unseen[:count]

    def probe(self, leaves: Mapping[str, Tensor]) -> Probe:
        """What is looked at after each round; the edge is left with these leaves."""
        self.edge.load_travelling(leaves)
        forget = score_set(self.edge, self.llm, self.data(self.scope.forget))
        return Probe(forget, *self._utility())

    def measure(self, leaves: Mapping[str, Tensor]) -> Measurement:
        """Everything, for any adapter of the run's kind: before, after, or retrained."""
        owner = self.scope.owner
        kept = self.scope.retain.get(owner) or [s for own in self.scope.retain.values() for s in own]
        sets = {
            "forget": self.data(self.scope.forget),
            "retain": self.data(some(kept, self.seed, "retain")),
            "unseen": self.data(self._unseen),
        }
        site = measure_site(
            self.edge,
            self.llm,
            self.features,
            sets,
            leaves=leaves,
            untuned=self.untuned,
            perturbed=self.perturbed,
            seed=self.seed,
        )
        utility, accuracy = self._utility()
        clients = {
            name: mean_probability(self.edge, self.llm, self.data(some(held, self.seed, name)))
            for name, held in self.scope.held_out.items()
            if held
        }
        return Measurement(
            site.forget, site.retain, site.unseen, utility, accuracy, clients, site.attacks, site.priv_leak
        )

    def _utility(self) -> tuple[float, float]:
        return utility_of(self.edge, self.llm, self.data(self._tests))


def utility_of(edge: NanoEdge, llm: LanguageModel, tests: ClientData) -> tuple[float, float]:
    """Mean answer probability on the test questions, and the share of those whose whole answer is the likeliest."""
    scores = token_scores(edge, llm, tests)
    return fmean(map(probability, scores)), fmean(exact_memorisation(each) == 1 for each in scores)
