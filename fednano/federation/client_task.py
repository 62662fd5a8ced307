"""What a client does when the server asks: introduce itself, train, evaluate."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from fednano.data import KINDS
from fednano.errors import ConfigError, DataError
from fednano.evaluation import perplexity
from fednano.federation.baselines import build_rule
from fednano.federation.client_state import state_of
from fednano.federation.faults import parse_faults
from fednano.federation.gathering import client_gradients
from fednano.federation.known_again import held_forgotten
from fednano.federation.marking import scores_of
from fednano.federation.messages import Instruction, Reply
from fednano.federation.misbehaviour import Vanished, falsify
from fednano.federation.participation import compose, contribute, own_leaves
from fednano.federation.personal import mixed_answers
from fednano.federation.schedules import fit_rank
from fednano.federation.secure_client import answer, check_ready, masked
from fednano.federation.worker import POOL, Withdrawn, Worker, site_name
from fednano.host import RemoteLLM
from fednano.models.language import LanguageModel
from fednano.training.answers import answer_losses, generate_answers, longest_answer
from fednano.training.data import ClientData, draw
from fednano.training.guard import Forgotten
from fednano.training.seeds import stream_seed

__all__ = ["evaluate", "gather", "hello", "install", "secure", "train"]


def hello(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Introduce the client: what it has and what it runs. Loads model and data, so training can start at once."""
    name = site_name(node)
    worker = Worker.get(instruction.config)
    try:
        share = worker.share(name, node, pool=False)
    except Withdrawn:
        facts = {"edge": worker.edge.edge.fingerprint, "simulated": str("data" not in node)}
        return Reply(name, instruction.round, {"bad-rows": 0, "samples": 0, "held-out": 0}, facts)
    facts = {
        "edge": worker.edge.edge.fingerprint,
        "spec": worker.edge.spec(),
        "basis": worker.edge.basis_fingerprint(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "simulated": str("data" not in node),
    }
    if "data" not in node and KINDS[share.kind].classes:  # a real site's label counts are its own business
        facts["labels"] = json.dumps(Counter(sample.answer for sample in share.data.samples), sort_keys=True)
    bad = worker.bad_rows()
    if bad:
        facts["bad-rows"] = "; ".join(str(row) for row in bad[:3])
    metrics: dict[str, float] = {
        "bad-rows": len(bad),
        "samples": len(share.data),
        "held-out": len(share.held_out),
    }
    return Reply(name, instruction.round, metrics, facts)


def train(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Train the adapters for one round from the leaves given, and report them."""
    config, name = instruction.config, site_name(node)
    if instruction.secure:
        check_ready(instruction, state_of(instruction, node, name))
    fault = parse_faults(str(instruction.advice.get("fault", "")))
    if fault and node.get("data"):
        raise ConfigError("the server asks this client to misbehave, which only simulated clients do.")
    if any(one.kind == "vanish" for one in fault):
        raise Vanished("a simulated fault: this client vanished in this round.")
    worker = Worker.get(config)
    worker.require_basis(instruction.basis)
    share = worker.share(name, node, pool=instruction.pool)
    acting = POOL if instruction.pool else name
    llm = worker.llm(instruction.ticket)
    before = _wire(llm)
    encoded = worker.features.encoded
    ready = time.time() - Worker.began if Worker.began else 0.0
    done = contribute(
        worker,
        instruction,
        llm,
        share.data,
        state_of(instruction, node, acting),
        client=acting,
        samples=config.samples * (config.participants(config.clients) if instruction.pool else 1),
        forgotten=_forgotten(worker, instruction, node),
    )
    after = _wire(llm)
    metrics = {
        **done.metrics,
        **({} if config.dp == "sample" else {"loss": done.outcome.loss}),
        "samples": done.outcome.samples,
        "steps": done.outcome.steps,
        "seconds": done.outcome.seconds,
        "start": ready,
        "encoded": worker.features.encoded - encoded,
        "step-sent": after[0] - before[0],
        "step-received": after[1] - before[1],
        "step-samples": after[2] - before[2],
    }
    facts = {
        "spec": worker.edge.spec(),
        "basis": worker.edge.basis_fingerprint(),
        "edge": worker.edge.edge.fingerprint,
    }
    reply = Reply(name, instruction.round, metrics, facts, done.leaves, done.fisher)
    if instruction.secure:
        rule = build_rule(config, config.rule)
        reply = masked(
            reply,
            instruction,
            rule,
            {**worker.start, **instruction.leaves},
            state_of(instruction, node, name),
        )
    return falsify(fault[0], reply) if fault else reply


def _forgotten(worker: Worker, instruction: Instruction, node: Mapping[str, Any]) -> list[Forgotten]:
    """What this client keeps forgotten while it trains for a round that all share in.

    Nothing under sample-level differential privacy: the forgotten samples' gradient would not be clipped.
    """
    if instruction.phase != "federated" or instruction.config.dp == "sample":
        return []
    return list(held_forgotten(worker, instruction, node).values())


def secure(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Take part in the exchanges of secure aggregation that are not training."""
    name = site_name(node)
    return answer(instruction, name, state_of(instruction, node, name))


def gather(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Send the gradients from which the server makes the adapters' basis."""
    config, name = instruction.config, site_name(node)
    worker = Worker.get(config)
    data = worker.share(name, node, pool=False).data
    count = min(config.gather_samples, len(data))
    chosen = draw(len(data), count, seed=stream_seed(config.seed, "gather", 0), client=name, start=0)
    data.warm(chosen)
    gradients = client_gradients(worker.edge.edge, worker.llm(instruction.ticket), data, chosen, config)
    return Reply(name, instruction.round, {"samples": count}, {}, gradients)


def install(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Take over the adapters' basis from the server."""
    name, worker = site_name(node), Worker.get(instruction.config)
    worker.install(instruction.leaves)
    return Reply(name, instruction.round, {}, {"basis": worker.edge.basis_fingerprint()})


def evaluate(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Judge the leaves given on the client's held-out samples."""
    config, name = instruction.config, site_name(node)
    worker = Worker.get(config)
    worker.require_basis(instruction.basis)
    share = worker.share(name, node, pool=False)
    if not share.held_out:
        raise DataError(f"{name} holds no samples out. Raise holdout, or give it more data.")
    personal = instruction.advice.get("personal") or instruction.advice.get("personal_adapter")
    memory = state_of(instruction, node, name).load(instruction.accepted) if personal else {}
    leaves = compose(worker, instruction, memory)
    fit_rank(worker.edge, leaves)
    worker.edge.load_travelling(leaves)
    llm, own = worker.llm(instruction.ticket), own_leaves(instruction, memory)
    longest = config.max_new_tokens or longest_answer(worker.edge, share.held_out)
    if own is None:
        answers = generate_answers(worker.edge, llm, worker.features, share.held_out, max_new_tokens=longest)
    else:
        answers = mixed_answers(
            *(worker.edge, own, llm, worker.features, share.held_out),
            reference=share.data.samples[: int(instruction.advice["mix_samples"])],
            strength=float(instruction.advice["mix_strength"]),
            max_new_tokens=longest,
        )
    scores = scores_of(config.metric, share.kind, answers, share.held_out)
    metrics = {"accuracy": next(iter(scores.values())), "samples": len(answers)}
    metrics |= {f"score-{name}": score for name, score in scores.items()}
    if own is None and not KINDS[share.kind].classes:
        data = ClientData(share.held_out, worker.edge, worker.features)
        loss = float(answer_losses(worker.edge, llm, data).double().mean())
        metrics |= {"eval-loss": loss, "score-perplexity": perplexity(loss)}
    return Reply(name, instruction.round, metrics, {})


def _wire(llm: LanguageModel) -> tuple[int, int, int]:
    """Bytes sent and received in training steps so far, and the samples they were for; zeros without a host."""
    if not isinstance(llm, RemoteLLM):
        return (0, 0, 0)
    step = llm.wire.step
    return (step.sent_bytes, step.received_bytes, step.samples)
