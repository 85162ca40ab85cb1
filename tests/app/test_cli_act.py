"""A person's hand on the command line, against a running Flyball: approve, stop, release, explain, the ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flyball.app.wiring import make_pipeline
from tests.app._http import served
from tests.app._runtime import SetClock, incident
from tests.app.crash_child import settings
from tests.app.test_cli import run


@pytest.mark.parametrize(
    "command",
    [
        "approvals", "approve", "deny", "stops", "stop", "resume", "release", "ledger show", "incident list",
        "runbook explain", "runbook reset",
    ],
)  # fmt: skip
def test_every_help_ends_with_two_examples(command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    assert done.stdout.partition("Examples:")[2].count(f"flyball {command}") >= 2


def test_a_plan_is_read_approved_watched_stopped_and_let_go(tmp_path: Path) -> None:
    clock = SetClock()
    with served(tmp_path, clock, pipeline=lambda: make_pipeline(settings())) as (client, runtime):
        at = ("--url", str(client.base_url).rstrip("/"))
        found = incident(runtime, clock)
        plan = client.get("/v1/approvals").json()[0]["hash"]

        listed = run("approvals", *at)
        assert f"{plan}  provider-failover for {found}, until" in listed.stdout
        assert "redirect provider=a: share " in listed.stdout

        explained = run("runbook", "explain", found, "--runbook", "provider-failover", *at)
        assert explained.stdout.startswith("provider-failover: suggest (mode_suggest")
        assert "ok  cooldown:" in explained.stdout

        approved = run("approve", plan, *at)
        assert (approved.returncode, approved.stdout.strip()) == (0, f"{plan}: approved")
        again = run("approve", plan, *at)
        assert again.returncode == 2
        assert "409: it was approved already; an answer counts once" in again.stderr

        stopped = run("stop", "runbook:provider-failover", "--reason", "drill", *at)
        assert stopped.stdout.strip().endswith("Take it back with: flyball resume runbook:provider-failover")
        assert "runbook:provider-failover  by local: drill" in run("stops", *at).stdout
        assert "STOPPED     runbook:provider-failover" in run("status", *at).stdout
        assert run("stop", "runbok:x", *at).returncode == 2

        (lease,) = client.get("/v1/directives").json()
        assert run("release", lease["id"], *at).stdout.strip() == f"{lease['id']}: let go"
        assert client.get("/v1/directives").json() == []
        assert (
            run("resume", "runbook:provider-failover", *at).stdout.strip()
            == "goes on: runbook:provider-failover"
        )
        assert run("stops", *at).stdout == "nothing is stopped\n"
        assert run("approvals", *at).stdout == "nothing waits for a person\n"
        assert run("runbook", "reset", "provider-failover", *at).returncode == 0

        data = ("--data", str(tmp_path))
        people = run("ledger", "list", "--kind", "person", *data).stdout
        assert [line.split("  ")[-1].split()[:3] for line in people.splitlines()] == [
            ["person", "local", "approve"],
            ["person", "local", "approve"],
            ["person", "local", "stop"],
            ["person", "local", "release"],
            ["person", "local", "resume"],
            ["person", "local", "reset"],
        ]
        key = people.split("  ")[1]
        shown = run("ledger", "show", key, *data).stdout
        assert f"subject = {plan}" in shown
        assert "sealed by" in shown
        offline = run("incident", "list", *data, "--json")
        assert json.loads(offline.stdout)["id"] == found
        assert f"{found}  " in run("incident", "show", found, *data).stdout
        assert run("ledger", "verify", *data).returncode == 0


def test_what_is_not_in_a_folder_is_said(tmp_path: Path) -> None:
    with served(tmp_path):
        pass
    data = ("--data", str(tmp_path))
    missing = run("incident", "show", "INC-NONE", *data)
    assert (missing.returncode, "no incident 'INC-NONE'" in missing.stderr) == (2, True)
    line = run("ledger", "show", "DEC-NONE", *data)
    assert (line.returncode, "no line 'DEC-NONE'" in line.stderr) == (2, True)
