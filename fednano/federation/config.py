"""The settings of a run: flat, typed, validated where they are read.

One dataclass serves every way to start a run: `fednano simulate` fills it from options, `flwr run` from
``[tool.flwr.app.config]``, and each client receives it from the server inside its messages. Keys are written with
hyphens outside of Python (``learning-rate``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fednano.errors import ConfigError, did_you_mean
from fednano.federation.ranges import check_together, check_values, hyphenated
from fednano.federation.recipe import parse_settings

__all__ = [
    "AUTO",
    "BACKENDS",
    "OTHER_WORK",
    "UNPROTECTED",
    "RunConfig",
    "Scalar",
    "check_backend",
]

Scalar = bool | int | float | str

AUTO = "auto"
"""The merge rule that the adapter's algebra asks for."""

BACKENDS = ("ray", "inprocess")
"""How a simulation runs its clients. ``ray``: Flower's simulation engine, one worker per core. ``inprocess``: no
start-up cost, one client at a time."""

OTHER_WORK = "unlearn"
"""Key beside the settings of a run in the app's run configuration: names a finished run whose unlearning queue is to be
worked on, instead of tuning."""

UNPROTECTED = "unlearn-unprotected"
"""Key beside it: do so though the run's updates were protected and those of a job are not."""


def check_backend(name: str) -> None:
    """Raise ConfigError unless ``name`` is one of :data:`BACKENDS`."""
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}; expected one of {', '.join(BACKENDS)}.")


def _setting(default: Scalar, text: str) -> Any:
    """A dataclass field with its one-line explanation, which help texts and docs show."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes, and where it writes.

    Raises:
        ConfigError: a value is out of its range; the message names the setting, the value and what is expected.
    """

    # What is tuned, on what
    model: str = _setting(
        "tiny", "'tiny' (in the package), a model folder, or a Hugging Face id of a LLaVA model"
    )
    dataset: str = _setting(
        "easy-vqa",
        "'easy-vqa'; a folder with train.jsonl, test.jsonl and images; a .jsonl, .csv or .parquet file; a folder of "
        "pictures, ScienceQA or IconQA; or a Hugging Face id",
    )
    data_kind: str = _setting(
        "auto",
        "what its rows are: 'auto' (by their columns), 'vqa', 'multiple-choice', 'instruction', "
        "'text-classification', 'token-classification' or 'image-classification'",
    )
    data_options: str = _setting(
        "", 'which column is what: \'text="review" label="stars" test="validation"\'; see docs/data.md'
    )
    clients: int = _setting(5, "number of clients in a simulation")
    partition: str = _setting(
        "dirichlet",
        "how a simulation divides the data: 'dirichlet' (by answers), 'iid', 'column', 'folders' (one "
        "each), or in growing sizes: 'linear', 'square', 'exponential'",
    )
    partition_by: str = _setting(
        "", "column to divide by: 'column' gives each client its values, 'dirichlet' skews by it"
    )
    alpha: float = _setting(0.3, "Dirichlet concentration: small means each client sees few kinds of answers")
    holdout: float = _setting(0.05, "share of a client's samples that it keeps for its own evaluation")
    # The adapters
    adapter: str = _setting("nano", "adapter family, by name")
    rank: int = _setting(16, "adapter rank")
    rank_schedule: str = _setting(
        "", "rank over the rounds: '1:4,6:8' is 4 from round 1 and 8 from round 6; empty = always 'rank'"
    )
    client_ranks: str = _setting(
        "",
        "ranks of the clients, taken in turn by name: '4,8,16'; at most 'rank', which the server merges at",
    )
    activation: str = _setting("linear", "non-linearity of the NanoAdapter: 'linear' or 'gelu'")
    scale: float = _setting(1.0, "factor on the adapter's output")
    adapter_options: str = _setting(
        "", "further options of the adapter: 'alpha=8 dropout=0.1'; see `fednano adapters`"
    )
    streams: str = _setting("image,text", "where adapters stand: 'image', 'text' or 'image,text'")
    # Local training
    rounds: int = _setting(10, "federated rounds")
    samples: int = _setting(300, "training samples per client and round")
    batch_size: int = _setting(16, "samples per step")
    optimizer: str = _setting("adam", "local optimiser: 'adam', 'adamw' or 'sgd'")
    learning_rate: float = _setting(3e-3, "local learning rate")
    lr_schedule: str = _setting("constant", "learning rate over the rounds: 'constant', 'linear' or 'cosine'")
    lr_final: float = _setting(0.1, "share of the learning rate that a schedule leaves in the last round")
    weight_decay: float = _setting(0.0, "local weight decay")
    proximal_mu: float = _setting(0.0, "FedProx: pull towards the round's starting adapters")
    clip_norm: float = _setting(0.0, "largest gradient norm of a step; 0 = no clipping")
    # Federation
    rule: str = _setting(
        "auto",
        "how updates are merged: 'auto', as the adapter's algebra asks, or a name of `fednano strategies`",
    )
    rule_options: str = _setting("", "options of the rule: 'floor=0.1 clip=16'")
    fisher_samples: int = _setting(128, "samples for a client's diagonal Fisher")
    fraction: float = _setting(1.0, "share of the clients that take part in each round")
    min_replies: int = _setting(1, "a round with fewer valid updates keeps the old adapters")
    over_select: float = _setting(
        0.0, "share of further clients to ask; a round goes on once enough have answered, whoever is first"
    )
    late: str = _setting(
        "drop",
        "a reply that comes after its round: 'drop' it, or 'buffer' it into the round it reaches (FedBuff)",
    )
    staleness: float = _setting(0.5, "a buffered update counts (1 + rounds late) ** -staleness")
    codec: str = _setting(
        "fp32",
        "uplink codec: fp32, bf16, fp16, int8, int4, sign, topk, dct; all but fp32 send the Fisher as 8 bits",
    )
    codec_options: str = _setting(
        "",
        "options of the codec: 'density=0.1', 'feedback=false', 'last=\"int4\"' (the codec of the last round)",
    )
    max_abs: float = _setting(100.0, "an update with a larger absolute value is refused")
    max_norm: float = _setting(0.0, "an update with a larger Euclidean norm is refused; 0 = no bound")
    faults: str = _setting(
        "",
        "simulated clients that misbehave: 'sign-flip:2' or 'sign-flip:2:4' (times 4), 'noise:1', 'nan:1', 'huge:1', "
        "'stale:1', 'foreign:1', 'vanish:0.3'; several with commas",
    )
    round_timeout: float = _setting(600.0, "seconds to wait for the updates of a round")
    rejoin_timeout: float = _setting(
        120.0,
        "seconds of them to wait for a client that is lost in mid-round to come back and be asked again; 0 = go on",
    )
    join_timeout: float = _setting(
        300.0, "seconds to wait for the clients to appear and to load their models"
    )
    # Privacy
    secure_aggregation: bool = _setting(
        False, "let the server see nothing but sums of updates; for rules that need no more"
    )
    secure_threshold: float = _setting(
        0.6, "share of a round's clients that must be left to add up securely; above 0.5"
    )
    dp: str = _setting(
        "off",
        "differential privacy of the adapters: 'off', 'client' (whole clients) or 'sample' (single samples)",
    )
    dp_clip: float = _setting(1.0, "largest norm of a client's change, or of a sample's gradient")
    dp_noise: float = _setting(1.0, "standard deviation of the noise over dp-clip")
    dp_epsilon: float = _setting(0.0, "budget: a round that would cost more is not begun; 0 = no budget")
    dp_delta: float = _setting(1e-5, "delta at which epsilon is counted")
    # Language model
    placement: str = _setting(
        "split", "'split': language model on the host; 'local': whole model at each client"
    )
    host_address: str = _setting(
        "",
        "address of a running language host, or several of one model, as a:1,b:2; empty = the server starts its own",
    )
    host_ca: str = _setting(
        "", "PEM file of the authority that signed that host's certificate; empty = loopback only"
    )
    host_token_file: str = _setting("", "file with the token that admits this run to that host, base64url")
    server_dir: str = _setting(
        "", "folder of a federation's server: its host, its keys, its audit log; see `fednano deploy`"
    )
    host_workers: int = _setting(2, "steps that the host computes at the same time")
    host_retry: float = _setting(60.0, "seconds that a client tries to reach a host that does not answer")
    wire_dtype: str = _setting(
        "float32", "number format of activations on the wire: float32, bfloat16, float16, int8"
    )
    wire_lossless: bool = _setting(
        False,
        "leave out what repeats itself in activations on the wire: the same bits in a third fewer bytes (bfloat16) "
        "or a sixth (float32), for some CPU",
    )
    exchange: str = _setting(
        "full",
        "what a step carries: 'full', embeddings and their gradients; 'factored', low-rank parts of samples that the "
        "host keeps (adapters without such parts stay with full); 'label-private', as full, but labels and head stay "
        "with the client",
    )
    host_batch_tokens: int = _setting(
        0,
        "most tokens of a batch of several clients' steps on the run's host; 0 = each alone, same bits always",
    )
    host_options: str = _setting(
        "",
        "further options of the host that the run starts: 'dtype=\"bfloat16\" compile=true'; see `fednano host --help`",
    )
    device: str = _setting("cpu", "device of encoder and adapters: 'cpu' or 'cuda'")
    threads: int = _setting(1, "torch threads per process; more threads can change the last bits")
    gather_samples: int = _setting(
        128, "samples of each client in the gradient from which adapters such as 'lora-sb' take their basis"
    )
    # Evaluation
    evaluate_every: int = _setting(1, "evaluate globally every so many rounds; 0 = only before and after")
    evaluate_samples: int = _setting(500, "test questions in the evaluations between rounds; 0 = all")
    final_samples: int = _setting(
        0, "test questions that the model answers after training, untuned and tuned; 0 = all"
    )
    evaluate_clients_every: int = _setting(
        0,
        "let clients judge the merged adapters on samples they hold out every so many rounds; 0 = at the end",
    )
    probe_forgotten_every: int = _setting(
        1, "look every so many rounds whether what was unlearned has come back; 0 = never"
    )
    guard_forgotten: float = _setting(
        1.0,
        "weight with which a client's steps keep forgotten what it has unlearned and still holds; 0 = off",
    )
    early_stop: int = _setting(0, "end after so many evaluations without a better one; 0 = never")
    keep: str = _setting(
        "last", "adapters to end with: 'last', or 'best' by the clients' evaluations, else by the server's"
    )
    metric: str = _setting(
        "auto",
        "what to judge answers by: 'auto' (by the data), 'exact-match', 'vqa', 'choice', 'token-f1', 'macro-f1', "
        "'rouge-l' or 'entity-f1'",
    )
    max_new_tokens: int = _setting(
        0, "longest answer, in tokens; 0 = as long as the longest right one, from 3 to 256"
    )
    baselines: bool = _setting(False, "also run local-only, centralised, and the other merging rule")
    # The run itself
    seed: int = _setting(0, "same seed, same bits")
    runs_dir: str = _setting("runs", "folder of the run folders")
    track: str = _setting(
        "",
        "where the run's numbers go besides: 'tensorboard', 'mlflow', 'wandb', 'prometheus' (or "
        "prometheus=HOST:PORT), or 'package.module:Class' of your own; several with commas",
    )
    cache_dir: str = _setting("", "folder for encoder features; empty = one inside the run folder")
    resume: str = _setting("", "id or folder of a run to continue")
    start_from: str = _setting(
        "",
        "id or folder of a finished run from whose adapters, and with whose tombstones, to start a new one",
    )

    def __post_init__(self) -> None:
        check_values(self)
        check_together(self)

    @property
    def adapter_settings(self) -> dict[str, Scalar]:
        """``adapter_options`` as values."""
        return parse_settings(self.adapter_options, "adapter-options")

    @property
    def data_settings(self) -> dict[str, Scalar]:
        """``data_options`` as values, with the column to divide by."""
        found = parse_settings(self.data_options, "data-options")
        return found | ({"group": self.partition_by} if self.partition_by else {})

    @property
    def rank_steps(self) -> list[tuple[int, int]]:
        """``rank_schedule`` as pairs of first round and rank.

        Raises:
            ConfigError: it is not a list of such pairs.
        """
        try:
            pairs = [part.split(":") for part in self.rank_schedule.split(",") if part.strip()]
            return [(int(start), int(rank)) for start, rank in pairs]
        except ValueError as error:
            raise ConfigError(
                f"rank-schedule is {self.rank_schedule!r}; expected pairs of round and rank such as '1:4,6:8'."
            ) from error

    @property
    def own_ranks(self) -> list[int]:
        """``client_ranks`` as numbers; empty where all clients have ``rank``.

        Raises:
            ConfigError: it is not a list of ranks.
        """
        try:
            return [int(part) for part in self.client_ranks.split(",") if part.strip()]
        except ValueError as error:
            raise ConfigError(
                f"client-ranks is {self.client_ranks!r}; expected ranks such as '4,8,16'."
            ) from error

    def participants(self, clients: int) -> int:
        """How many of so many clients a round needs."""
        return max(1, round(self.fraction * clients))

    @property
    def stream_names(self) -> list[str]:
        """The streams that carry an adapter."""
        return [part.strip() for part in self.streams.split(",") if part.strip()]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RunConfig:
        """Build from hyphenated keys; unknown keys are refused with the nearest known one.

        Raises:
            ConfigError: unknown key, wrong type, or a value out of range.
        """
        known = {hyphenated(spec.name): spec for spec in dataclasses.fields(cls)}
        unknown = [key for key in values if hyphenated(key) not in known]
        if unknown:
            hint = (
                did_you_mean(hyphenated(unknown[0]), known) or f" Known settings: {', '.join(sorted(known))}."
            )
            raise ConfigError(f"unknown setting {unknown[0]!r}.{hint}")
        return cls(
            **{
                known[hyphenated(key)].name: _widen(known[hyphenated(key)], value)
                for key, value in values.items()
            }
        )

    def to_mapping(self) -> dict[str, Scalar]:
        """All settings under hyphenated keys."""
        return {hyphenated(spec.name): getattr(self, spec.name) for spec in dataclasses.fields(self)}

    def changed(self, **changes: Any) -> RunConfig:
        """A copy with some settings replaced, validated again."""
        return dataclasses.replace(self, **changes)


def _widen(spec: dataclasses.Field[Any], value: Any) -> Any:
    """An integer is a fine way to write a whole float."""
    if spec.type == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
