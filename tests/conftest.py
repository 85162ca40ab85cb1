"""What every test may use. Helpers live beside the tests that need them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.servers.postgres import Postgres


def require_server(name: str, reason: str) -> None:
    """Skips the test because server `name` cannot be had; where FLYBALL_REQUIRE_SERVERS=1 (CI), fails it instead."""
    if os.environ.get("FLYBALL_REQUIRE_SERVERS") == "1":
        pytest.fail(f"{name} is required here but cannot be had: {reason}")
    pytest.skip(f"{name}: {reason}")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL; each test takes a database of its own from it."""
    from tests.servers.postgres import CannotStart
    from tests.servers.postgres import postgres as started

    server = started()
    try:
        found = server.__enter__()
    except CannotStart as e:
        require_server("PostgreSQL", str(e))
        raise
    yield found
    server.__exit__(None, None, None)


@pytest.fixture(params=["sqlite", "postgres"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """A database of each kind that a runtime may stand on, with nothing in it."""
    if request.param == "sqlite":
        return tmp_path / "flyball.sqlite3"
    server: Postgres = request.getfixturevalue("postgres")
    return server.migrated()
