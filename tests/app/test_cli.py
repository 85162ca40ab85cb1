"""The command line's habits: answers, errors, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flyball.app.settings import load
from tests.processes import flyball, free_port


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flyball.app", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
    )


def test_alone_it_prints_the_five_things_one_does_with_it() -> None:
    done = run()
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  flyball")] == [
        "demo", "init", "run", "status", "replay",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "command",
    ["run", "replay", "status", "init", "doctor", "demo", "lab score", "incident show", "ledger list"],
)
def test_every_help_ends_with_two_examples(command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    examples = done.stdout.partition("Examples:")[2]
    assert examples.count(f"flyball {command}") >= 2


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("run", "--port", "x"), ("replay",), ("run", "--nonsense")]
)
def test_wrong_use_is_exit_code_two_and_no_stack_trace(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_nobody_there_is_exit_code_three_and_says_what_to_do() -> None:
    done = run("status", "--url", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 3
    assert "flyball run" in done.stderr
    assert "Traceback" not in done.stderr


def test_init_writes_settings_that_load_and_a_runbook_that_is_accepted(tmp_path: Path) -> None:
    done = run("init", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    settings = load(tmp_path / "flyball.yaml")
    assert settings.mode == "suggest"
    assert (
        yaml.safe_load((tmp_path / "runbooks/provider-failover.yaml").read_text())["name"]
        == "provider-failover"
    )
    assert "GENERIC_LOGGER_ENDPOINT" in done.stdout
    elsewhere = run("doctor", "--config", str(tmp_path / "flyball.yaml"), cwd=tmp_path.parent)
    assert "bad" not in elsewhere.stdout, elsewhere.stdout
    again = run("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_the_schema_of_events_is_json_and_names_every_type() -> None:
    schema = json.loads(run("schema", "events").stdout)
    assert set(schema["discriminator"]["mapping"]) == {
        "llm_call",
        "agent_step",
        "gpu_sample",
        "change",
        "evaluation",
    }


def test_all_wrong_settings_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("mode: maybe\nwindow_s: -1\nwindos: 3\n")
    done = run("run", "--config", str(tmp_path / "f.yaml"))
    assert done.returncode == 2
    for name in ("mode", "window_s", "windos"):
        assert name in done.stderr
    assert "did you mean" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_running_flyball_is_looked_at_from_the_command_line(tmp_path: Path) -> None:
    with flyball(tmp_path) as url:
        status = run("status", "--url", url, "--json")
        assert status.returncode == 0, status.stderr
        assert set(json.loads(status.stdout)) >= {
            "events", "rejected", "duplicates", "late", "incidents", "pages", "directives", "lag_s", "position",
        }  # fmt: skip
        assert run("incident", "list", "--url", url).returncode == 0
        missing = run("incident", "show", "INC-NONE", "--url", url)
        assert missing.returncode == 2
        assert "no incident" in missing.stderr
        doctor = run("doctor", "--url", url, cwd=tmp_path)
        assert doctor.returncode == 0, doctor.stdout
        assert "running" in doctor.stdout
    offline = run("status", "--data", str(tmp_path / "data"), "--json")
    assert offline.returncode == 0, offline.stderr
    assert run("ledger", "verify", "--data", str(tmp_path / "data")).returncode == 0


def test_a_data_folder_without_a_database_is_named() -> None:
    done = run("ledger", "list", "--data", "/nonexistent")
    assert done.returncode == 2
    assert "no Flyball database" in done.stderr
