"""`fednano unlearn`: requests to forget, from a site's signature to the server's receipt.

Exit codes: 0 done; 2 a mistake that the message explains; 3 the language host is out of reach; 4 the request, the
approval or its signature is refused; 5 the job is not in a state for that, or did not end committed; 6 a receipt or its
log is not what was signed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fednano.cli.unlearn_records  # noqa: F401 - its commands join the same app
from fednano.cli.unlearn_common import (
    AsJson,
    DataFolders,
    JobId,
    RunName,
    RunsDir,
    ServerKey,
    app,
    data_folders,
    job_line,
    open_desk,
    operator,
    print_out,
    show_job,
)
from fednano.cli.unlearn_live import run_live, run_ordered
from fednano.errors import ConfigError, JobStateError, RequestRefused

if TYPE_CHECKING:
    from fednano.unlearning.jobs.desk import Desk

__all__ = ["app"]


@app.command()
def keygen(
    site: Annotated[str, typer.Option(help="Make the key of this site.")] = "",
    approver: Annotated[str, typer.Option(help="Make the key of this approver.")] = "",
    keys: Annotated[Path, typer.Option(help="Folder for the key files.")] = Path("keys"),
    run: Annotated[str, typer.Option(help="Also register it with this run.")] = "",
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Make a key pair, NAME.key (mode 0600) and NAME.pub; with --run, let the run believe it."""
    from fednano.security.keys import create_key, load_signer, write_private

    if bool(site) == bool(approver):
        raise ConfigError("give either --site NAME or --approver NAME.")
    name, path = site or approver, keys / f"{site or approver}.key"
    made = not (run and path.exists())  # an existing key can be registered with a further run
    signer = create_key(keys, name) if made else load_signer(path)
    card = {"name": name, "public_key": signer.public, "role": "site" if site else "approver"}
    if site:
        card["salt"] = signer.salt
    write_private(keys / f"{name}.card.json", json.dumps(card, indent=1).encode() + b"\n")
    if run:
        _register(open_desk(run, runs_dir), card)
    shown = {
        "name": name,
        "key": str(path),
        "public_key": signer.public,
        "made": made,
        "registered": run or None,
    }
    where = (
        f"; registered with {run}"
        if run
        else f". Register it with: fednano unlearn register {keys / name}.card.json"
    )
    print_out(shown, f"{path}{'' if made else ' (there already)'}{where}", as_json)


@app.command()
def register(
    card: Annotated[Path, typer.Argument(help="NAME.card.json, as keygen wrote it.")],
    run: RunName = "latest",
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Let a run believe the key of a site or an approver. The card holds the site's salt: carry it safely."""
    try:
        content = json.loads(card.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{card} is no card of a key: {error}.") from error
    _register(open_desk(run, runs_dir), content)
    known = {"name": content["name"], "role": content["role"]}
    print_out(known, f"{content['role']} {content['name']} is registered.", as_json)


@app.command()
def submit(
    site: Annotated[str, typer.Option(help="The site whose samples are to be forgotten.")] = "",
    samples: Annotated[Path | None, typer.Option(help="File with sample ids, one a line.")] = None,
    subject: Annotated[
        str, typer.Option(help="A subject: a part of its samples' ids, or an image's name.")
    ] = "",
    label: Annotated[str, typer.Option("--class", help="All samples with this answer; two approvals.")] = "",
    client: Annotated[bool, typer.Option("--client", help="All samples of the site; two approvals.")] = False,
    reason: Annotated[str, typer.Option(help="Why, for people, such as 'GDPR Art. 17'.")] = "",
    deadline: Annotated[str, typer.Option(help="Date or time until which it is to be done.")] = "",
    method: Annotated[str, typer.Option(help="How to unlearn.")] = "loku",
    rank: Annotated[int, typer.Option(help="Rank of the job's low-rank pair.")] = 4,
    rounds: Annotated[int, typer.Option(help="Most rounds.")] = 5,
    steps: Annotated[int, typer.Option(help="Most steps a round.")] = 20,
    seed: Annotated[int, typer.Option(help="Same seed, same bits.")] = 0,
    utility_floor: Annotated[float, typer.Option(help="Part of the utility that must remain.")] = 0.9,
    key: Annotated[
        Path | None, typer.Option(help="The site's private key; by default keys/SITE.key.")
    ] = None,
    data: DataFolders = None,
    out: Annotated[Path | None, typer.Option(help="Write the signed request, do not hand it in.")] = None,
    request: Annotated[Path | None, typer.Option(help="Hand in a request that was signed elsewhere.")] = None,
    run: RunName = "latest",
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Sign a request to forget and hand it in. The same request twice is one job."""
    from fednano.security.keys import load_signer
    from fednano.unlearning.jobs.holdings import choose
    from fednano.unlearning.jobs.request import Plan, sign_request

    desk = open_desk(run, runs_dir, data)
    if request is not None:
        envelope = _read_request(request)
    else:
        scopes = {
            "samples": samples is not None,
            "subject": bool(subject),
            "class": bool(label),
            "client": client,
        }
        kinds = [kind for kind, given in scopes.items() if given]
        if not site or len(kinds) != 1 or not reason:
            raise ConfigError(
                "give --site, --reason and exactly one of --samples, --subject, --class and --client; got "
                f"{', '.join(kinds) or 'no scope'}."
            )
        signer = load_signer(key or Path("keys") / f"{site}.key")
        if signer.name != site:
            raise ConfigError(f"{key} is the key of {signer.name!r}; expected {site}.key for site {site!r}.")
        sites = desk.holdings.sites()
        if site not in sites:
            raise ConfigError(
                f"site {site!r} took no part in this run. Its sites: {', '.join(sorted(sites))}."
            )
        holding = desk.holdings.holding(site)
        if holding is None:
            raise ConfigError(f"the data of {site} is not in the run; say where it is: --data {site}=FOLDER")
        ids = choose(holding, kinds[0], subject or label, _read_ids(samples) if samples else ())
        plan = Plan(method, rank, rounds, steps, seed, utility_floor)
        _check_deadline(deadline)
        envelope = sign_request(
            signer,
            run=desk.place.folder.id,
            kind=kinds[0],
            name=subject or label,
            ids=ids,
            plan=plan,
            reason=reason,
            deadline=deadline,
        )
    if out is not None:
        out.write_text(json.dumps(envelope, indent=1) + "\n")
        typer.echo(f"{out}: hand it in with: fednano unlearn submit --request {out.name} --run RUN")
        return
    job, new = desk.submit(
        envelope, actor=f"site:{envelope['request']['site']}" if _named(envelope) else "unknown"
    )
    show_job(desk, job, as_json, extra={"new": new})
    if job.state.value == "rejected":
        raise RequestRefused(f"job {job.id} is rejected: {job.note}")


@app.command("list")
def list_jobs(
    run: RunName = "latest",
    runs_dir: RunsDir = "runs",
    refused: Annotated[bool, typer.Option(help="List requests that were not accepted instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the jobs of a run."""
    from fednano.unlearning.jobs.views import summary

    desk = open_desk(run, runs_dir)
    rows = desk.store.refusals() if refused else [summary(job) for job in desk.store.jobs()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        if refused:
            typer.echo(f"{row['time']}  {row['site']:<12} {row['reason']}")
            continue
        scope = f"{row['scope']:<8} {row['samples']:>6} samples"
        late = "OVERDUE  " if row["overdue"] else ""
        typer.echo(
            f"{row['job']}  {row['state']:<11} {row['site']:<12} {scope}  {late}{row['note']}".rstrip()
        )
    if not rows:
        typer.echo("none")


@app.command()
def show(job: JobId, run: RunName = "latest", runs_dir: RunsDir = "runs", as_json: AsJson = False) -> None:
    """Show one job: request, approvals, rounds, every move with its time and actor."""
    desk = open_desk(run, runs_dir)
    show_job(desk, desk.store.job(job), as_json)


@app.command()
def watch(
    job: JobId,
    run: RunName = "latest",
    runs_dir: RunsDir = "runs",
    interval: Annotated[float, typer.Option(help="Seconds between looks.")] = 1.0,
    timeout: Annotated[float, typer.Option(help="Give up after so many seconds; 0 = never.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Follow a job until it ends; code 0 when it is committed, 5 when it ended otherwise or time is up."""
    from fednano.unlearning.jobs.states import FINAL, State
    from fednano.unlearning.jobs.views import summary

    desk, began, seen = open_desk(run, runs_dir), time.monotonic(), ""
    while True:
        current = desk.store.job(job)
        rounds = desk.store.rounds(current.batch) if current.batch else []
        line = json.dumps({**summary(current), "round": rounds[-1] if rounds else None}, sort_keys=True)
        if line != seen:
            typer.echo(line if as_json else job_line(current, rounds))
            seen = line
        if current.state in FINAL:
            if current.state is not State.COMMITTED:
                raise JobStateError(f"job {job} ended {current.state.value}: {current.note}")
            return
        if timeout and time.monotonic() - began > timeout:
            raise JobStateError(f"job {job} is {current.state.value} after {timeout:g} s.")
        time.sleep(max(0.05, interval))


@app.command()
def approve(
    job: JobId,
    key: Annotated[Path, typer.Option(help="The approver's private key.")],
    decline: Annotated[bool, typer.Option("--decline", help="Decline instead.")] = False,
    reason: Annotated[str, typer.Option(help="Why it is declined.")] = "",
    run: RunName = "latest",
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Approve a job with an approver's key. Classes and whole clients need two different approvers."""
    from fednano.security.keys import load_signer

    desk, signer = open_desk(run, runs_dir), load_signer(key)
    show_job(desk, desk.decline(job, signer, reason) if decline else desk.approve(job, signer), as_json)


@app.command()
def cancel(
    job: JobId,
    reason: Annotated[str, typer.Option(help="Why.")] = "",
    run: RunName = "latest",
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Cancel a job that has not ended; a running one stops at its next safe point. The adapter is as it was."""
    desk = open_desk(run, runs_dir)
    show_job(desk, desk.cancel(job, actor=operator(), reason=reason), as_json)


@app.command("run")
def run_queue(
    run: RunName = "latest",
    runs_dir: RunsDir = "runs",
    data: DataFolders = None,
    server_key: ServerKey = None,
    reference: Annotated[
        bool,
        typer.Option(
            help="Also retrain without the samples, to compare; costs what that part of the run did."
        ),
    ] = False,
    probe: Annotated[
        str, typer.Option(help="Probes whose findings go into the receipt; see 'verify --probe'.")
    ] = "",
    superlink: Annotated[
        str,
        typer.Option(help="Work through the SuperNodes of this SuperLink (a name that `flwr run` knows)."),
    ] = "",
    allow_unprotected: Annotated[
        bool,
        typer.Option(
            "--allow-unprotected",
            help="Also where the run had secure aggregation or noise; updates of a job have neither.",
        ),
    ] = False,
    server: Annotated[
        Path | None,
        typer.Option(help="Have the server that is up in this folder do it, through its sites, and wait."),
    ] = None,
    app_folder: Annotated[
        Path, typer.Option("--app", help="With --superlink: the folder of the Flower app.")
    ] = Path(),
    as_json: AsJson = False,
) -> None:
    """Work on the queue until it is empty; finish first what a killed worker left. Code 5 if a job did not commit.

    With --server or --superlink the samples stay where they are: the connected sites do the steps. Otherwise this
    machine needs every site's data: that of a simulated run, or what --data names.
    """
    from fednano.unlearning.jobs.loku import LokuRunner
    from fednano.unlearning.jobs.states import State
    from fednano.unlearning.jobs.views import summary
    from fednano.unlearning.jobs.work import work

    desk = open_desk(run, str(server / "runs") if server and runs_dir == "runs" else runs_dir, data)
    tell = (lambda text: None) if as_json else typer.echo
    if (superlink or server) and (data or reference or server_key or probe):
        raise ConfigError(
            "--server and --superlink go without --data, --reference, --probe and --server-key: the sites keep their "
            "data, no machine holds all that a retrained reference or a probe needs, and the server's app signs with "
            "the run's own key."
        )
    if superlink and server:
        raise ConfigError("give --server or --superlink, not both.")
    if server:
        done = run_ordered(desk, server, tell, allow_unprotected=allow_unprotected)
    elif superlink:
        done = run_live(desk, superlink, app_folder, tell, allow_unprotected=allow_unprotected)
    else:
        from fednano.unlearning.probes import check_probes

        runner = LokuRunner(
            data_folders(data),
            reference=reference,
            allow_unprotected=allow_unprotected,
            probes=check_probes(probe) if probe else (),
        )
        done = work(desk, runner, desk.place.server_key(server_key), tell=tell)
    if as_json:
        typer.echo(json.dumps([summary(job) for job in done], indent=1))
    elif not done:
        typer.echo("nothing to do")
    left = [job for job in done if job.state not in (State.COMMITTED, State.CANCELLED)]
    if left:
        raise JobStateError("; ".join(f"{job.id} is {job.state.value}: {job.note}" for job in left))


def _register(desk: Desk, card: dict[str, Any]) -> None:
    registry = desk.place.registry
    try:
        if card["role"] == "site":
            known = list(desk.holdings.sites())
            registry = registry.with_site(card["name"], card["public_key"], card["salt"], known=known)
        else:
            registry = registry.with_approver(card["name"], card["public_key"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"the card of the key lacks {error}; make it again with keygen.") from error
    registry.save()


def _named(envelope: Any) -> bool:
    return (
        isinstance(envelope, dict)
        and isinstance(envelope.get("request"), dict)
        and "site" in envelope["request"]
    )


def _read_request(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no signed request: {error}.") from error


def _read_ids(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the list of sample ids {path} cannot be read: {error}.") from error


def _check_deadline(text: str) -> None:
    from fednano.unlearning.jobs.job import now, parse_time

    try:
        late = bool(text) and parse_time(text) < now()
    except ValueError as error:
        raise ConfigError(f"deadline is {text!r}; expected 2026-01-31 or 2026-01-31T12:00:00Z.") from error
    if late:
        raise ConfigError(f"the deadline {text} has passed.")
