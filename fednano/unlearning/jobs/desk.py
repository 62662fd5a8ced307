"""The desk: takes requests in, judges them, collects approvals, and queues what may be done.

Each step is one transaction of the store; a desk that was killed goes on where it stopped when anybody opens it again.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from fednano.errors import FednanoError, JobStateError, RequestRefused
from fednano.runs.tombstones import read_tombstones
from fednano.security.canonical import canonical, sha256_hex
from fednano.security.keys import Signer, salted_hash, valid_signature
from fednano.unlearning.jobs.holdings import Holding, Holdings
from fednano.unlearning.jobs.job import Job, now, parse_time
from fednano.unlearning.jobs.place import Place
from fednano.unlearning.jobs.request import authenticate, request_key
from fednano.unlearning.jobs.states import FINAL, State
from fednano.unlearning.methods import get_method

__all__ = ["Desk"]

_PURPOSE = "unlearning approval"
_DESK = "desk"
_SMALL = ("samples", "subject")
_COUNTED = frozenset(State) - {
    State.SUBMITTED,
    State.REJECTED,
    State.CANCELLED,
    State.FAILED,
    State.ROLLED_BACK,
}


class Desk:
    """The desk of one run.

    Args:
        place: the job files of the run.
        holdings: makes what is known about the sites' data; called when a request has to be judged.
    """

    def __init__(self, place: Place, holdings: Callable[[], Holdings]) -> None:
        self.place = place
        self.store = place.store
        self._make_holdings = holdings
        self._known: Holdings | None = None

    @property
    def holdings(self) -> Holdings:
        """What is known about the sites' data."""
        if self._known is None:
            self._known = self._make_holdings()
        return self._known

    def submit(self, envelope: object, *, actor: str) -> tuple[Job, bool]:
        """Take in a signed request and carry it as far as it goes by itself.

        Returns:
            The job and whether it is new. A request that is not acceptable in itself becomes a rejected job.

        Raises:
            RequestRefused: it is not authentic, or replayed. No job is made; the attempt is written down.
        """
        try:
            checked = authenticate(envelope, self.place.registry, run=self.place.folder.id)
            job, new = self.store.add(request_key(checked["request"]), checked, actor=actor)
        except RequestRefused as error:
            self.store.refuse(_claimed_site(envelope), str(error))
            raise
        return self.advance(job.id), new

    def advance(self, identity: str) -> Job:
        """Carry a job forward as far as it goes without anybody's help: at most into the queue."""
        job = self.store.job(identity)
        try:
            if job.state is State.SUBMITTED:
                facts, problem = self._judge(job)
                target = State.REJECTED if problem else State.VALIDATED
                job = self.store.move([job.id], target, actor=_DESK, note=problem, facts=facts)[0]
            if job.state is State.VALIDATED:
                needed, have = self.needed(job), len(self.valid_approvals(job))
                if have < needed:
                    return job
                note = f"{have} approvals" if needed else "needs no approval"
                job = self.store.move([job.id], State.APPROVED, actor=_DESK, note=note)[0]
            if job.state is State.APPROVED:
                job = self.store.move([job.id], State.QUEUED, actor=_DESK)[0]
        except JobStateError:
            return self.store.job(identity)  # another process carried it on in the meantime
        return job

    def advance_all(self) -> None:
        """Carry on every job that a killed process left behind."""
        for job in self.store.jobs(State.SUBMITTED, State.VALIDATED, State.APPROVED):
            self.advance(job.id)

    def needed(self, job: Job) -> int:
        """How many approvals a job needs."""
        return int(self.place.registry.policy.approvals[job.request["kind"]])

    def valid_approvals(self, job: Job) -> list[dict[str, str]]:
        """Approvals by keys that are believed now, each key once, none the owner's."""
        registry = self.place.registry
        believed = set(registry.approvers.values()) - {job.envelope["public_key"]}
        return [
            each
            for each in self.store.approvals(job.id)
            if each["public"] in believed
            and valid_signature(each["public"], _PURPOSE, _statement(job, "approve"), each["signature"])
        ]

    def approve(self, identity: str, signer: Signer) -> Job:
        """Approve a job with an approver's key.

        Raises:
            RequestRefused: the key is no approver's, or has approved before.
            JobStateError: the job is not waiting for approvals.
        """
        job = self._waiting(identity, signer)
        if any(each["public"] == signer.public for each in self.store.approvals(identity)):
            raise RequestRefused(
                f"{signer.name} has approved {identity} already; the second approval must come from another approver."
            )
        signature = signer.sign(_PURPOSE, _statement(job, "approve"))
        self.store.add_approval(identity, signer.public, signer.name, signature)
        return self.advance(identity)

    def decline(self, identity: str, signer: Signer, reason: str) -> Job:
        """Decline a job with an approver's key; raises as :meth:`approve` does."""
        self._waiting(identity, signer)
        note = f"declined by {signer.name}: {reason or 'no reason given'}"
        return self.store.move([identity], State.REJECTED, actor=f"approver:{signer.name}", note=note)[0]

    def cancel(self, identity: str, *, actor: str, reason: str = "") -> Job:
        """Cancel a job: at once while it waits, at the next safe point while it runs.

        Raises:
            JobStateError: it has ended, or its commit has begun.
        """
        job = self.store.job(identity)
        if job.state in FINAL:
            raise JobStateError(
                f"job {identity} is {job.state.value}; only a job that has not ended can be cancelled."
                + (" Undo it with: fednano unlearn rollback" if job.state is State.COMMITTED else "")
            )
        if job.state is State.RUNNING:
            self.store.ask_to_stop(identity, actor)
            return self.store.job(identity)
        if any(identity in body["jobs"] for _, _, body in self.store.intents()):
            raise JobStateError(f"job {identity} is being committed; roll it back afterwards.")
        return self.store.move([identity], State.CANCELLED, actor=actor, note=reason)[0]

    def _waiting(self, identity: str, signer: Signer) -> Job:
        job = self.advance(identity)
        registry = self.place.registry
        if signer.public not in registry.approvers.values():
            listed = ", ".join(sorted(registry.approvers)) or "none"
            raise RequestRefused(
                f"the key of {signer.name} is no registered approver's; approvers: {listed}. Register one with: "
                "fednano unlearn keygen --approver NAME --run RUN"
            )
        if job.state is not State.VALIDATED:
            raise JobStateError(
                f"job {identity} is {job.state.value}; only a validated job waits for approvals."
            )
        return job

    def _judge(self, job: Job) -> tuple[dict[str, Any], str]:
        """Facts about a request's scope, and why it cannot be accepted; empty when it can."""
        facts: dict[str, Any] = {"samples": len(job.request["ids"]), "ownership": "declared by the site"}
        try:
            self._check_run(job)
            self._check_scope(job, facts)
            self._check_quota(job, len(job.request["ids"]))
        except FednanoError as error:
            return facts, str(error)
        return facts, ""

    def _check_run(self, job: Job) -> None:
        sites = self.holdings.sites()
        if job.site not in sites:
            raise RequestRefused(
                f"site {job.site!r} took no part in this run; its sites: {', '.join(sorted(sites))}."
            )
        get_method(job.request["method"])
        problem = self.holdings.base_model()
        if problem:
            raise RequestRefused(f"{problem}.")

    def _check_scope(self, job: Job, facts: dict[str, Any]) -> None:
        request, sites = job.request, self.holdings.sites()
        wanted, own = set(request["ids"]), sites[job.site]
        remaining = own - len(wanted)
        holding = self.holdings.holding(job.site)
        if holding is not None:
            remaining = self._check_owned(job, holding, facts)
        elif len(wanted) > own:
            raise RequestRefused(f"the request names {len(wanted)} samples, {job.site} has trained on {own}.")
        forgotten = read_tombstones(self.place.folder.path)
        others = sum(
            max(0, count - sum(len(each.hashes) for each in forgotten.for_site(name).sets))
            for name, count in sites.items()
            if name != job.site
        )
        if remaining <= 0 and others <= 0:
            raise RequestRefused(
                "no retain data would be left in the whole run; there is nothing to keep. Delete the run instead."
            )
        if remaining <= 0 and request["kind"] != "client":
            raise RequestRefused(
                f"the request names all training samples of {job.site}. Ask for the whole client (--client), which "
                "needs two approvals."
            )

    def _check_owned(self, job: Job, holding: Holding, facts: dict[str, Any]) -> int:
        """Check the scope against the site's own data; returns how many training samples would remain."""
        request, salt = job.request, self.place.registry.site(job.site).salt
        wanted = set(request["ids"])
        hashed = {salted_hash(salt, "sample", sample.id): sample for sample in holding.samples}
        foreign = len(wanted - set(hashed))
        if foreign:
            raise RequestRefused(
                f"{foreign} of {len(wanted)} samples are not {job.site}'s, or are forgotten already. A site may ask "
                "for its own samples only."
            )
        chosen = [hashed[each] for each in wanted]
        if request["kind"] == "class" and not _one_class(chosen, salt, request["label"]):
            raise RequestRefused("the samples are not all of the class that the request names.")
        first = [holding.first_round[sample.id] for sample in chosen if sample.id in holding.first_round]
        facts |= {"ownership": "checked", "trained": len(first)}
        if not first:
            raise RequestRefused(
                "none of these samples was ever trained on, so there is nothing to unlearn and nothing is done."
            )
        facts["first_exposure"] = min(first)
        return sum(salted_hash(salt, "sample", sample.id) not in wanted for sample in holding.train)

    def _check_quota(self, job: Job, count: int) -> None:
        policy, present = self.place.registry.policy, now()
        earlier = [o for o in self.store.jobs(*_COUNTED) if o.site == job.site and o.id != job.id]
        today = [o for o in earlier if present - parse_time(o.created) < timedelta(days=1)]
        if len(today) >= policy.requests_a_day:
            raise RequestRefused(
                f"over quota: {job.site} has made {len(today)} requests within 24 hours, {policy.requests_a_day} are "
                "accepted. Ask again later, or have the operator change the policy."
            )
        if job.request["kind"] not in _SMALL:
            return
        month = sum(
            int(o.facts["samples"])
            for o in earlier
            if o.request["kind"] in _SMALL and present - parse_time(o.created) < timedelta(days=30)
        )
        total = self.holdings.sites()[job.site]
        if month + count > policy.share * total:
            raise RequestRefused(
                f"over quota: with this request {job.site} would have named {month + count} of {total} samples within "
                f"30 days; {policy.share:.0%} are accepted. Ask for the whole client (--client), or have the operator "
                "change the policy."
            )


def _one_class(samples: list[Any], salt: str, label: str) -> bool:
    answers = {sample.answer for sample in samples}
    return len(answers) == 1 and salted_hash(salt, "class", answers.pop()) == label


def _statement(job: Job, decision: str) -> bytes:
    return canonical(
        {"decision": decision, "job": job.id, "request_sha256": sha256_hex(canonical(job.request))}
    )


def _claimed_site(envelope: object) -> str:
    request = envelope.get("request") if isinstance(envelope, dict) else None
    return str(request.get("site", "")) if isinstance(request, dict) else ""
