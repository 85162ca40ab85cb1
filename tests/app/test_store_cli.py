"""The command line on PostgreSQL: what is wrong is said once, in one line, and an exit code tells the kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.processes import flyball
from tests.servers.postgres import Postgres


def said(*arguments: str, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "flyball.app", *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, **env},
    )  # fmt: skip
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_a_database_is_refused_until_it_is_migrated_and_then_runs(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.empty()
    data = str(tmp_path / "data")
    code, _, error = said("run", "--database", url, "--data", data, "--port", "0")
    assert (code, len(error.splitlines())) == (1, 1), error
    assert "has no tables of Flyball yet" in error
    assert "`flyball database upgrade --database URL`" in error
    assert said("database", "current", FLYBALL_DATABASE=url)[:2] == (
        1,
        "no tables of Flyball; this Flyball needs schema 4: `flyball database upgrade`",
    )
    assert said("database", "upgrade", "--database", url)[:2] == (0, "tables made, schema 4")
    with flyball(tmp_path, env={"FLYBALL_DATABASE": url}) as address:
        event = b'{"type": "llm_call", "at": 1790000000, "id": "a", "provider": "p", "model": "m"}\n'
        assert httpx.post(f"{address}/v1/events", content=event).json()["accepted"] == 1
        assert said("ledger", "verify", "--database", url)[:2] == (0, "the ledger is whole")
        code, _, error = said("run", "--database", url, "--data", data, "--port", "0")
        assert (code, "is in use by the Flyball" in error.splitlines()[-1]) == (2, True), error
    assert not (tmp_path / "data" / "flyball.sqlite3").exists()
    secrets = [f for f in tmp_path.rglob("*") if f.is_file() and b"flyball-secret" in f.read_bytes()]
    assert secrets == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("flyball-secret", "wrong"), "password authentication failed"),
        (("/postgres", "/nonesuch"), '"nonesuch" does not exist'),
        (("127.0.0.1:", "127.0.0.1:1"), "is it running"),
    ],
    ids=["password", "name", "port"],
)
def test_what_does_not_let_us_in_is_told_in_one_line(
    postgres: Postgres, tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    old, new = change
    url = postgres.url.replace(old, new)
    if change[1] == "127.0.0.1:1":
        url = "postgresql://flyball:flyball-secret@127.0.0.1:1/flyball"
    code, out, error = said("run", "--database", url, "--data", str(tmp_path), "--port", "0")
    assert (code, out, len(error.splitlines())) == (3, "", 1), error
    assert says in error
    assert "flyball-secret" not in error
