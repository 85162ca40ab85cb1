"""What can be said of Dockerfile, docker-compose.yml and what it mounts without starting any of it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from docs.generate import metrics_page
from flyball.app.cli import app
from flyball.app.settings import load, unknown_variables
from tests.deploy.compose import OURS, ROOT, panel_queries, substituted, variables

EXAMPLE_ENV = ROOT / "deploy/example.env"
ALERTS = ROOT / "deploy/prometheus/alerts.yml"


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = substituted({})["services"]
    return found


@pytest.mark.parametrize("name", services())
def test_a_service_may_do_no_more_than_it_must(name: str) -> None:
    service = services()[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert service.get("read_only") is (None if name == "kafka" else True)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert service["logging"]["options"]["max-size"]


@pytest.mark.parametrize("name", services())
def test_what_lasts_is_started_again_and_looked_at(name: str) -> None:
    service = services()[name]
    once = name in ("topics", "database")
    assert service["restart"] == ("no" if once else "unless-stopped")
    if once or name == "load":
        assert service["healthcheck"] == {"disable": True}
    elif name not in OURS:  # ours have the image's
        assert service["healthcheck"]["test"][0] == "CMD"


def test_every_image_is_a_variable_with_its_public_name() -> None:
    written = (ROOT / "docker-compose.yml").read_text()
    images = re.findall(r"^\s+image: (.*)$", written, re.M)
    assert len(images) == 5
    for image in images:
        assert re.fullmatch(r"\$\{[A-Z]+_IMAGE:-[a-z/]+:[\w.-]+\}", image), image
    assert all(re.fullmatch(r"\$\{\w+\}", f) for f in re.findall(r"^FROM (\S+)", dockerfile(), re.M))


def test_the_example_of_variables_names_them_all_with_their_defaults() -> None:
    example = dict(
        line.split("=", 1) for line in EXAMPLE_ENV.read_text().splitlines() if line and line[0] != "#"
    )
    secret = {name for name, value in variables().items() if value.startswith("trial-")}
    assert example == {name: "" if name in secret else value for name, value in variables().items()}
    assert secret >= {"POSTGRES_PASSWORD", "PEOPLE_TOKEN", "HASH_KEY", "GRAFANA_PASSWORD"}


@pytest.mark.parametrize("name", OURS)
def test_commands_and_variables_of_our_services_are_understood(name: str) -> None:
    service = services()[name]
    node: Any = typer.main.get_command(app)
    words = list(service["command"])
    while words and hasattr(node, "commands") and words[0] in node.commands:
        node = node.commands[words.pop(0)]
    node.make_context("flyball", [w.replace("/etc/flyball", str(ROOT / "deploy/flyball")) for w in words])
    assert unknown_variables(service["environment"]) == []


def test_the_mounted_settings_are_taken_with_the_variables_of_the_compose_file() -> None:
    settings = load(ROOT / "deploy/flyball/flyball.yaml", environ=services()["control-1"]["environment"])
    assert (settings.kafka.bootstrap, settings.kafka.partitions, settings.host) == (
        "kafka:9092",
        8,
        "0.0.0.0",
    )
    assert settings.database.get_secret_value().startswith("postgresql://flyball@postgres:")
    assert {t.name: sorted(t.roles) for t in settings.tokens} == {
        "gateways": ["enforce", "ingest"],
        "dashboards": ["read"],
        "people": ["admin"],
    }


# --- Dockerfile ----------------------------------------------------------------------------------------------------


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def test_the_dockerfile_needs_no_buildkit_and_ends_as_nobody() -> None:
    text = dockerfile()
    assert not re.search(r"^# *syntax=|--mount=|--chmod|--link|<<\w+", text, re.M)
    assert re.findall(r"^USER (.*)$", text, re.M) == ["10001:10001"]
    check = shlex.split(text[text.index("HEALTHCHECK") :].split("CMD ", 1)[1].splitlines()[0].strip("[]"))
    compile(check[-1], "HEALTHCHECK", "exec")


def test_nothing_but_the_package_is_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    roots = yaml.safe_load(
        re.search(r"dev-mode-dirs = (\[.*\])", (ROOT / "pyproject.toml").read_text())[1]  # type: ignore[index]
    )
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert kept == {"pyproject.toml", "README.md", "LICENSE", "requirements/dev.txt", *roots}
    assert "*" in lines


# --- Prometheus and Grafana ----------------------------------------------------------------------------------------


def exported() -> set[str]:
    return set(re.findall(r"^\| `(flyball_\w+)`", metrics_page(), re.M))


@pytest.mark.parametrize(("panel", "query"), panel_queries())
def test_a_panel_asks_for_what_is_exported(panel: str, query: str) -> None:
    assert named(query) <= exported() | {"up"}, panel
    assert named(query)


def test_alerts_ask_for_what_is_exported_and_say_what_to_do() -> None:
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    assert len(rules) > 5
    for rule in rules:
        assert named(rule["expr"]) <= exported() | {"up"}, rule["alert"]
        assert rule["annotations"].keys() == {"summary", "do"}
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_panels_stand_beside_each_other_and_ask_the_provisioned_source() -> None:
    board = json.loads((ROOT / "deploy/grafana/dashboards/flyball.json").read_text())
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["datasource"]["uid"] == source["datasources"][0]["uid"]
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"])
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/flyball.yml").read_text())
    mounts = dict(v.split(":")[:2] for v in services()["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["providers"][0]["options"]["path"]


def named(query: str) -> set[str]:
    """Metrics in a query: `up`, and whatever is ours."""
    return set(re.findall(r"\b(flyball_\w+|up)\b(?=[{\[\s)]|$)", query))


def test_every_mounted_folder_is_there() -> None:
    for service in services().values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (ROOT / Path(source)).is_dir()
