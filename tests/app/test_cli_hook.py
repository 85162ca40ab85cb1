"""`flyball hook conform` as a platform team runs it: against the example, in processes of their own, killed for real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import answers, eventually, free_port, stop
from tests.remediation._hooks import SECRET

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "hook_receiver.py"

FORGETFUL = """
import sys
sys.path.insert(0, sys.argv[3])
import hook_receiver as r
from pathlib import Path
folder = Path(sys.argv[2])
hook = r.Hook(folder, r.World(folder, ["node-1"]), r.os.environ["HOOK_SECRET"], 0.05)
hook.db.executescript("delete from orders; delete from tokens")
r.serve(hook, int(sys.argv[1])).serve_forever()
"""
"""The example, but for a memory that does not outlive it."""


def flyball(
    *words: str, secret: str = SECRET.get_secret_value(), **more: str
) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if k != "HOOK_SECRET"} | more
    return subprocess.run(
        [sys.executable, "-m", "flyball.app", "hook", "conform", *words],
        cwd=ROOT,
        env=environ | ({"HOOK_SECRET": secret} if secret else {}) | {"HOOK_TAKES_S": "0.05"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def url() -> tuple[str, str]:
    port = str(free_port())
    return f"http://127.0.0.1:{port}/", port


def test_the_example_passes_every_check_and_is_killed_on_the_way(tmp_path: Path) -> None:
    there, port = url()
    command = f"{sys.executable} {EXAMPLE} {port} {tmp_path} node-1"
    listening = str(free_port())
    done = flyball(
        there, "--action", "drain", "--target", "node:node-1", "--target", "gpu:node-1/gpu-3", "--command", command,
        "--listen", listening, "--json", FLYBALL_URL=f"http://127.0.0.1:{listening}",
    )  # fmt: skip
    checks = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(checks) > 20
    assert {c["result"] for c in checks} == {"passed"}
    assert (tmp_path / "nodes" / "node-1").read_text() == "ready"
    # Of every order one line and of its undo one; an undo that a kill cut off may stand there twice.
    done_for = [line.split()[:2] for line in (tmp_path / "done.log").read_text().splitlines()]
    starts = [id for id, what in done_for if what == "drain"]
    assert len(starts) == len(set(starts)) >= 7


def test_a_receiver_that_forgets_when_it_is_killed_fails_that_check(tmp_path: Path) -> None:
    there, port = url()
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    command = f"{sys.executable} {tmp_path / 'forgetful.py'} {port} {tmp_path} {EXAMPLE.parent}"
    done = flyball(
        there, "--action", "drain", "--target", "node-1", "--command", command, "--only", "crash", "--only", "duplicate",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "passed   duplicate:" in done.stdout
    assert "failed   crash:" in done.stdout
    assert "! sent: status of start, until it is terminal; expected: a terminal status within 30 s; came: HTTP 404" in done.stdout  # fmt: skip
    assert "1 passed, 1 failed, 0 not run" in done.stdout


@pytest.mark.parametrize(
    ("words", "secret", "code", "says"),
    [
        pytest.param([], SECRET.get_secret_value(), 3, "start the receiver", id="nothing answers"),
        pytest.param([], "", 2, "--secret", id="no secret"),
        pytest.param([], "whsec_QUJD", 2, "24 to 64 bytes", id="a short secret"),
        pytest.param(["--params", "[]"], SECRET.get_secret_value(), 2, "is no JSON object", id="params"),
        pytest.param(
            ["--only", "crush"], SECRET.get_secret_value(), 2, "did you mean 'crash'", id="no check"
        ),
        pytest.param(
            ["--command", "/nonexistent"], SECRET.get_secret_value(), 2, "cannot be started", id="command"
        ),
        pytest.param(
            ["--command", "false"], SECRET.get_secret_value(), 3, "before it answered", id="ends at once"
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_line(words: list[str], secret: str, code: int, says: str) -> None:
    done = flyball(url()[0], "--action", "drain", "--target", "node-1", *words, secret=secret)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not secret or secret not in done.stderr


def test_an_action_and_a_target_have_to_be_named_because_they_are_really_carried_out() -> None:
    assert flyball(url()[0]).returncode == 2


def test_the_commands_of_the_guide_work_one_after_the_other(tmp_path: Path) -> None:
    """As they stand in docs/hooks.md, in a shell, but for the port and the folder."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "hooks.md").read_text(), re.S)
    port = str(free_port())
    text = [b.replace("9922", port).replace("hook-data", str(tmp_path / "data")) for b in blocks]
    start, without, with_command = text
    (tmp_path / "bin").mkdir()
    for name, words in (("python", ""), ("flyball", "-m flyball.app")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOOK_TAKES_S": "0.05"}

    def shell(script: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", script], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True
        )

    install, export, run = start.strip().splitlines()
    assert install.startswith("pip install ")
    receiver = shell(f"{export}\necho $HOOK_SECRET\nexec {run}")
    try:
        assert receiver.stdout is not None
        environ["HOOK_SECRET"] = receiver.stdout.readline().strip()
        assert eventually(lambda: answers(int(port)), 60, 0.05)
        out, _ = (first := shell(without)).communicate(timeout=120)
        assert (first.returncode, out.splitlines()[-1]) == (0, "20 passed, 0 failed, 2 not run")
    finally:
        stop(receiver)
    out, _ = (second := shell(with_command)).communicate(timeout=120)
    assert (second.returncode, out.splitlines()[-1]) == (0, "21 passed, 0 failed, 1 not run")
