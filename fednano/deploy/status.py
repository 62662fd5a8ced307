"""What `fednano status` shows, put together from what server, run and jobs write down."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fednano.deploy.jobs import listed
from fednano.deploy.node import read_status
from fednano.deploy.orders import JOBS
from fednano.runs import RunFolder

__all__ = ["gather", "lines", "rounds"]


def gather(root: Path, *, site: bool) -> dict[str, Any]:
    """Everything about a server (``root`` is its folder) or a site (its bundle). ``up`` tells whether it runs."""
    status = read_status(root / "state")
    if status is None:
        return {"up": False, "folder": str(root)}
    found: dict[str, Any] = {"up": True, "folder": str(root), **status}
    if site:
        return found
    order = status.get("order") or {}
    folder = root / "runs" / str(order["run"]) if order.get("run") else None
    if folder is not None and folder.is_dir():
        done = rounds(folder)
        total = int(RunFolder(folder).read_json("config.json")["rounds"])
        found["run"] = {
            "id": folder.name,
            "round": len(done),
            "rounds": total,
            "last": done[-1] if done else None,
        }
    found["jobs"] = [asdict(job) for job in listed(root / "runs")]
    return found


def rounds(folder: Path) -> list[dict[str, Any]]:
    """The rounds of a run's main phase that are done: number, training loss, accuracy, seconds."""
    found: dict[int, dict[str, Any]] = {}
    for record in RunFolder(folder).metrics():
        if record.get("scope") == "global" and record.get("phase") == "federated" and record.get("round"):
            known = {
                "round": record["round"],
                "loss": _rounded(record.get("train_loss")),
                "accuracy": _rounded(record.get("accuracy")),
                "seconds": _rounded(record.get("seconds"), 1),
            }
            found[int(record["round"])] = known
    return [found[number] for number in sorted(found)]


def _rounded(value: object, digits: int = 4) -> float | None:
    return round(float(value), digits) if isinstance(value, (int, float)) else None


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    if not found["up"]:
        return [f"nothing is up in {found['folder']}"]
    out = [f"{found['federation']}{' / ' + found['site'] if 'site' in found else ''}, process {found['pid']}"]
    for each in found["processes"]:
        restarted = f", restarted {each['restarts']} times" if each["restarts"] else ""
        out.append(
            f"  {each['name']:<12} {'process ' + str(each['pid']) if each['pid'] else 'down'}{restarted}"
        )
    for each in found.get("sites", ()):
        connected = "connected" if each["connected"] else "away"
        out.append(f"  {each['site']:<24} {each['state']:<9} {connected}")
    if order := found.get("order"):
        what = f"unlearning jobs of {order['run']}, " if order["kind"] == JOBS else ""
        out.append(f"  order {order['id']}: {what}{order['state']} {order['note']}".rstrip())
    if "run" in found:
        last = found["run"]["last"] or {}
        said = ", ".join(f"{name} {value}" for name, value in last.items() if name != "round")
        out.append(
            f"  run {found['run']['id']}: round {found['run']['round']}/{found['run']['rounds']}  {said}"
        )
    host = found.get("host")
    if host:
        load = {
            name: host.get(name, 0) for name in ("in_flight", "buffered_bytes", "step_done", "step_samples")
        }
        out.append("  host  " + "  ".join(f"{name} {value}" for name, value in load.items()))
    for job in found.get("jobs", ()):
        at = f", round {job['round']}" if job["round"] else ""
        out.append(
            f"  job {job['job']} of {job['run']} ({job['site']}): {job['state']}{at} {job['note']}".rstrip()
        )
    return out
