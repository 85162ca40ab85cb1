"""The `runtime` fixture: one body of each scenario, on every way that events can take through Flyball."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract._runtimes import Memory, OnKafka, OnSqlite, Replayed, Runtime
from tests.kafka.conftest import kafka as kafka  # the fixture


@pytest.fixture(params=["memory", "sqlite", "replay", "kafka"])
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Runtime]:
    """One of each, with nothing in it, and little room for what waits."""
    made: dict[str, type[Runtime]] = {"memory": Memory, "sqlite": OnSqlite, "replay": Replayed}
    if request.param == "kafka":
        found: Runtime = OnKafka(tmp_path, request.getfixturevalue("kafka").config())
    else:
        found = made[request.param](tmp_path)
    with found:
        yield found
