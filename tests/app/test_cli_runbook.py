"""`flyball runbook …` as a person uses it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flyball.app.cli import app
from flyball.core.errors import ConfigError
from flyball.runbooks import loader

LIBRARY = Path(loader.__file__).parent / "library"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["runbook", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def first(tmp_path: Path) -> Path:
    assert run("new", "first-steps", "--folder", str(tmp_path / "runbooks"))[0] == 0
    return tmp_path / "runbooks" / "first-steps.yaml"


def test_new_writes_a_commented_tested_runbook_that_lints_clean(first: Path) -> None:
    text = first.read_text()
    assert text.count("#") > 15
    assert "tests:" in text
    assert "mode: suggest" in text
    assert run("lint", str(first.parent)) == (0, "", "1 runbook, nothing wrong\n")


def test_new_says_that_it_replaces_a_shipped_one(tmp_path: Path) -> None:
    assert "note: it replaces" in run("new", "provider-failover", "--folder", str(tmp_path))[2]
    assert "note: it" not in run("new", "my-failover", "--folder", str(tmp_path))[2]


def test_new_overwrites_nothing_unless_told(first: Path) -> None:
    first.write_text("mine")
    with pytest.raises(ConfigError, match="--force"):
        run("new", "first-steps", "--folder", str(first.parent))
    assert first.read_text() == "mine"
    assert run("new", "first-steps", "--folder", str(first.parent), "--force")[0] == 0
    assert first.read_text() != "mine"


@pytest.mark.parametrize("name", ["First", "a b", "../x", "", "-a", "a" * 65, "a_b"])
def test_new_takes_no_name_that_is_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no name"):
        run("new", "--folder", str(tmp_path), "--", name)
    assert list(tmp_path.iterdir()) == []


def test_lint_prints_path_line_column_code_and_what_would_be_right(first: Path) -> None:
    first.write_text(first.read_text().replace("incident.severity", "incident.sevrity"))
    code, out, err = run("lint", str(first))
    assert (code, err) == (1, "")
    assert re.fullmatch(
        rf"{re.escape(str(first))}:17:6: RB104 unknown name 'incident.sevrity' in the condition; "
        r"did you mean 'incident.severity'\?\n",
        out,
    )


def test_lint_as_json_has_the_same_in_parts(first: Path) -> None:
    first.write_text(first.read_text().replace("mode: suggest", "mode: automatic"))
    code, out, _ = run("lint", str(first), "--json")
    found = json.loads(out)
    assert code == 1
    assert (found["path"], found["line"], found["column"], found["code"]) == (str(first), 22, 7, "RB108")
    assert "write observe, suggest, approve or auto" in found["message"]


def test_lint_of_what_is_not_there_is_a_finding(tmp_path: Path) -> None:
    code, out, _ = run("lint", str(tmp_path / "gone"))
    assert code == 1
    assert f"{tmp_path / 'gone'}:1:1: RB120 cannot be read" in out


def test_lint_needs_a_path() -> None:
    assert run("lint")[0] == 2


def test_the_shipped_runbooks_lint_clean() -> None:
    assert run("lint", str(LIBRARY))[:2] == (0, "")


def test_list_tells_name_path_mode_and_source(first: Path) -> None:
    code, out, _ = run("list", "--runbooks", str(first.parent), "--json")
    rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert code == 0
    assert rows["first-steps"] == {
        "name": "first-steps", "path": str(first), "mode": "suggest", "source": "directory",
    }  # fmt: skip
    assert rows["provider-failover"]["source"] == "packaged"
    assert set(rows) == {"first-steps", *(p.stem for p in LIBRARY.glob("*.yaml"))}
    lines = run("list", "--runbooks", str(first.parent))[1].splitlines()
    assert len(lines) == len(rows)
    assert any(line.split() == ["first-steps", "suggest", "directory", str(first)] for line in lines)


def test_show_prints_a_runbook_as_it_is_written(first: Path) -> None:
    shipped = LIBRARY / "provider-failover.yaml"
    assert run("show", "provider-failover") == (0, shipped.read_text(), "")
    assert run("show", "first-steps", "--runbooks", str(first.parent))[1] == first.read_text()


def test_show_of_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(ConfigError, match="did you mean 'provider-failover'"):
        run("show", "provider-failovr")


def test_schema_prints_the_one_that_is_checked_in() -> None:
    checked_in = Path(__file__).parents[2] / "docs" / "runbook.schema.json"
    assert run("schema")[1] == checked_in.read_text()
