"""Docs are current, and the commands they show work."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from docs.generate import pages

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LONG_RUNNING = {("run",), ("demo",), ("lab", "score")}
"""Commands that do not end by themselves or take long: their options are checked, they are run by other tests."""
NEEDS_SERVER = {("status",), ("incident",), ("dead-letters",), ("doctor",)}
NEEDS_FILES = {("replay",), ("ledger",)}


@pytest.mark.parametrize("name", sorted(pages()))
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == pages()[name], "run `make docs`"


def shown_commands() -> list[tuple[str, str]]:
    """Every `flyball …` line of a code block, with the page it stands on."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:sh|console|bash)\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.strip().removeprefix("$ ").split("#")[0].strip()
                if command.startswith("flyball"):
                    found.append((page.name, command))
    return sorted(set(found))


def test_the_docs_show_commands() -> None:
    assert len(shown_commands()) > 10


@pytest.mark.parametrize(("page", "command"), shown_commands(), ids=lambda v: str(v)[:60])
def test_a_command_shown_in_the_docs_is_understood(page: str, command: str, tmp_path: Path) -> None:
    """What can run alone is run; for the others the words and options are checked by the parser itself."""
    words = shlex.split(command)[1:]
    words = [w for w in words if not w.startswith((">", "|"))]
    head = tuple(words[:1])
    runs_alone = head + tuple(words[1:2]) not in LONG_RUNNING and head not in LONG_RUNNING | NEEDS_SERVER | NEEDS_FILES
    if runs_alone:
        result = subprocess.run([sys.executable, "-m", "flyball.app", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"{page}: {command}\n{result.stderr}"
        return
    import typer.main
    from flyball.app.cli import app
    from typer.exceptions import TyperException

    node = typer.main.get_command(app)
    while words and hasattr(node, "commands") and words[0] in node.commands:
        node = node.commands[words.pop(0)]
    try:
        node.make_context("flyball", list(words), resilient_parsing=False)
    except TyperException as e:
        pytest.fail(f"{page}: {command}: {e}")


def test_every_kind_of_addition_is_explained_in_five_lines() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for kind in ("detector", "action", "notifier", "format", "runbook"):
        assert f"… a{'n' if kind == 'action' else ''} {kind}.**" in text


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []
