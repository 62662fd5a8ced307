"""Unit files: they parse, and say what the plan says."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fednano.cli.commands import app
from fednano.deploy.plan import EXAMPLE, Plan
from fednano.deploy.render import FORMATS, render
from fednano.errors import ConfigError
from fednano.host_settings import HostSettings

PLAN = Plan("hospitals", ("site-a", "site-b"), ("fl.example.org",), fleet_port=1443, host_port=1444)


def commands(kind: str) -> list[list[str]]:
    """Command lines of all services of a format, without the program."""
    files = render(PLAN, kind, Path("/srv/federation"))
    if kind == "systemd":
        return [_unit(text)["Service"]["ExecStart"].split()[1:] for text in files.values()]
    documents = [d for name, text in files.items() if name.endswith("yaml") for d in yaml.safe_load_all(text)]
    if kind == "compose":
        return [service["command"] for document in documents for service in document["services"].values()]
    pods = [d["spec"]["template"]["spec"] for d in documents if d["kind"] == "StatefulSet"]
    return [container["args"] for pod in pods for container in pod["containers"]]


def _unit(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


@pytest.mark.parametrize("kind", FORMATS)
def test_every_command_line_is_one_that_fednano_has(kind: str) -> None:
    found = commands(kind)
    assert found
    for words in found:
        done = CliRunner().invoke(app, [*words[:2], "--help"])
        assert done.exit_code == 0, words
        assert words[2] in done.output


def test_systemd_restarts_and_shuts_in() -> None:
    units = render(PLAN, "systemd", Path("/srv/federation"))
    for text in units.values():
        service = _unit(text)["Service"]
        assert service["Restart"] == "always"
        assert service["UMask"] == "0077"
        assert service["ReadWritePaths"].startswith("/srv/federation/")
    assert "--bundle /srv/federation/%i" in units["fednano-site@.service"]


def test_compose_publishes_the_plans_ports() -> None:
    files = render(PLAN, "compose", Path("/srv/federation"))
    (server,) = yaml.safe_load(files["compose.server.yaml"])["services"].values()
    assert server["ports"] == ["1443:1443", "1444:1444"]
    assert {"compose.site-a.yaml", "compose.site-b.yaml"} < set(files)


def test_kubernetes_objects_belong_together() -> None:
    documents = list(yaml.safe_load_all(render(PLAN, "kubernetes", Path("/srv"))["server.yaml"]))
    by_kind = {document["kind"]: document for document in documents}
    pod = by_kind["StatefulSet"]["spec"]["template"]
    assert by_kind["Service"]["spec"]["selector"] == pod["metadata"]["labels"]
    named = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    assert named == {"fleet": 1443, "host": 1444}
    assert {port["targetPort"] for port in by_kind["Service"]["spec"]["ports"]} == set(named)
    claim = pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == by_kind["PersistentVolumeClaim"]["metadata"]["name"]
    assert "resources" not in pod["spec"]["containers"][0]
    on_gpu = Plan("h", ("a",), ("n",), host=HostSettings(device="cuda"))
    assert "nvidia.com/gpu" in render(on_gpu, "kubernetes", Path("/srv"))["server.yaml"]


def test_the_command_writes_files(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text(EXAMPLE)
    arguments = [
        "deploy",
        "render",
        "systemd",
        str(tmp_path / "federation.toml"),
        "--out",
        str(tmp_path / "units"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "units").iterdir()) == [
        *("fednano-server.service", "fednano-site@.service")
    ]
    with pytest.raises(ConfigError, match="unknown format 'nomad'"):
        render(PLAN, "nomad", tmp_path)
