"""`kill -9` at any point: after the restart everything equals an uninterrupted run; nothing twice, nothing acknowledged lost."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from sqlalchemy import text

from flyball.app.orders import Order, encode_order
from flyball.app.store.database import reading
from flyball.core.directives import Approval, StopChange
from flyball.lab.estate import default_estate
from flyball.lab.faults import ProviderOutage
from flyball.lab.sim import START_AT, Simulator
from tests.app.crash_child import ScriptClock, Step, build, pipeline, play
from tests.processes import eventually
from tests.servers.postgres import Postgres

ROOT = Path(__file__).parents[2]


PEOPLE: dict[int, list[tuple[Literal["stop", "resume"], str]]] = {
    60: [("stop", "tenant:t1")],
    130: [("stop", "all")],
    170: [("resume", "all"), ("resume", "tenant:t1"), ("resume", "runbook:never-stopped")],
}
"""At which second who says what."""


def script(seconds: int = 420) -> list[Step]:
    """An outage in lab traffic, with ticks and people: some hundred records that open, act on and resolve an incident.

    A pipeline beside it says what the traffic's gateways obey, so that the redirect shows, and what waits, so that a person
    can approve it. Somebody stops Flyball for a tenant, then altogether, and takes it back.
    """
    simulator = Simulator(default_estate(rate=10.0), seed=7)
    governor = pipeline()
    simulator.add_fault(ProviderOutage("a", 0.9, START_AT + 60, START_AT + 150))
    steps: list[Step] = []

    def say(order: Order) -> None:
        steps.append(Step(order.at, order=encode_order(order)))
        governor.take(order)

    for second in range(1, seconds + 1):
        now = START_AT + second
        for change, scope in PEOPLE.get(second, ()):
            say(StopChange(change=change, scope=scope, by="ann", at=now))
        for waiting in governor.waiting():
            if now - waiting.since > 3.0:
                say(Approval(waiting=waiting.hash, approve=True, by="ann", at=now))
        for batch in simulator.step(now):
            steps.append(Step.of(batch.received_at or now, batch.sender, list(batch.events)))
            governor.feed(batch)
        steps.append(Step(now))
        governor.tick(now)
        simulator.set_directives(governor.directives())
    return steps


def contents(database: Path | str) -> dict[str, list[Any]]:
    """Everything that people and programs can see, and the log; not when a message is due, nor when snapshots were taken."""
    queries = {
        "log": "select id, kind, sender, n, body from log order by id",
        "incidents": "select id, seq, state, root, revision, body from incidents order by seq",
        "incident_changes": "select seq, incident, at, old, new, reason, revision from incident_changes order by seq",
        "ledger": "select seq, key, at, kind, incident, body, hash from ledger order by seq",
        # Not `shown`: what a stop holds back depends on how far the stages were when it came.
        "directives": "select id, epoch, expires_at, ended_at, change, reason, body from directives order by id",
        "stops": "select * from stops order by scope",
        "operations": "select * from operations order by id, verb",
        "outbox": "select id, incident, revision, channel, why, state, body from outbox order by id",
        "meta": "select key, value from meta order by key",
    }
    with reading(database) as c:
        return {name: [tuple(r) for r in c.execute(text(q))] for name, q in queries.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Step], dict[str, list[Any]], Path]:
    """The script, what an uninterrupted run of it leaves, and the script as a file."""
    folder = tmp_path_factory.mktemp("whole")
    steps = script()
    path = folder / "script"
    path.write_bytes(msgspec.msgpack.encode(steps))
    clock = ScriptClock()
    runtime = build(folder / "db", clock)
    runtime.start()
    play(runtime, clock, steps, 0, speak=False)
    assert runtime.stop(60)
    return steps, contents(folder / "db"), path


def killed_and_restarted(database: Path | str, script_path: Path, kills: list[int], seed: int) -> None:
    """Runs the child, killing it once after each of the given positions was acknowledged; the last life runs to the end.

    How often it takes snapshots differs from life to life: it must not show.
    """
    chance = random.Random(seed)
    for kill_at in [*kills, None]:
        every_s = str(chance.choice((0.5, 5.0, 20.0, 1e9)))
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.app.crash_child", str(database), str(script_path), every_s],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        if kill_at is not None:
            for line in child.stdout:
                if line.strip().isdecimal() and int(line) >= kill_at:
                    child.send_signal(signal.SIGKILL)
                    break
        _, errors = child.communicate(timeout=120)
        assert child.returncode in (0, -signal.SIGKILL), errors[-2000:]


def test_the_script_leads_to_an_incident_and_a_directive(
    whole: tuple[list[Step], dict[str, list[Any]], Path],
) -> None:
    """Otherwise the tests below would compare nothing with nothing."""
    _, found, _ = whole
    assert found["incidents"]
    assert found["ledger"]
    assert found["directives"]
    assert found["outbox"]
    people = [json.loads(body)["kind"] for _, _, _, kind, _, body, _ in found["ledger"] if kind == "person"]
    assert people[:1] == ["stop"]
    assert {"approve", "stop", "resume"} <= set(people)


def differences(found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> list[str]:
    return [name for name in expected if found[name] != expected[name]]


def test_five_kills_at_random_points_change_nothing(
    whole: tuple[list[Step], dict[str, list[Any]], Path], where: Path | str
) -> None:
    """On PostgreSQL as well, and there as on SQLite: `whole` is SQLite's."""
    steps, expected, path = whole
    kills = sorted(random.Random(5).sample(range(1, len(steps)), 5))
    killed_and_restarted(where, path, kills, 5)
    assert differences(contents(where), expected) == []


# --- with others standing by ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def child(url: str, script: Path, every_s: str = "5.0") -> Iterator[subprocess.Popen[str]]:
    """A process that plays the script once the database is its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.app.crash_child", url, str(script), every_s],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.communicate(timeout=30)


def reached(process: subprocess.Popen[str], position: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().isdecimal() and int(line) >= position:
            return
    assert process.stderr is not None
    raise AssertionError(process.stderr.read()[-2000:])


def waits(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"


def test_a_standby_takes_over_from_a_killed_owner_without_losing_or_repeating_anything(
    whole: tuple[list[Step], dict[str, list[Any]], Path], postgres: Postgres
) -> None:
    steps, expected, script = whole
    url = postgres.migrated()
    with child(url, script) as first, child(url, script) as second, child(url, script) as third:
        players = [first, second, third]
        for process in players:
            waits(process)
        for kill_at in (len(steps) // 3, 2 * len(steps) // 3):
            owner = owning(postgres, url, players)
            reached(owner, kill_at)
            owner.kill()
            players.remove(owner)
        last = owning(postgres, url, players)
        _, errors = last.communicate(timeout=120)
        assert last.returncode == 0, errors[-2000:]
    assert differences(contents(url), expected) == []
    with reading(url) as c:
        assert c.execute(text("select epoch from owner")).scalar() == 3


def owning(postgres: Postgres, url: str, players: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """The process that owns the database now."""
    by_id = {str(p.pid): p for p in players}

    def found() -> subprocess.Popen[str] | None:
        with reading(url) as c:
            holder = c.execute(text("select holder from owner")).scalar() or ""
        return by_id.get(holder.rpartition(":")[2])

    owner = eventually(found)
    assert isinstance(owner, subprocess.Popen)
    return owner


def test_an_owner_that_hangs_is_cut_off_and_stores_nothing_when_it_wakes(
    whole: tuple[list[Step], dict[str, list[Any]], Path], postgres: Postgres
) -> None:
    steps, expected, script = whole
    url = postgres.migrated()
    with child(url, script) as hung:
        reached(hung, len(steps) // 2)
        hung.send_signal(signal.SIGSTOP)
        with child(url, script) as standby:
            _, errors = standby.communicate(timeout=120)
            assert standby.returncode == 0, errors[-2000:]
        hung.send_signal(signal.SIGCONT)
        _, errors = hung.communicate(timeout=60)
        assert hung.returncode != 0
        assert "nothing was stored" in errors
    assert differences(contents(url), expected) == []


# --- long ------------------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10))
def test_ten_times_ten_kills_at_random_points_change_nothing(
    whole: tuple[list[Step], dict[str, list[Any]], Path], where: Path | str, seed: int
) -> None:
    steps, expected, path = whole
    kills = sorted(random.Random(1000 + seed).sample(range(1, len(steps)), 10))
    killed_and_restarted(where, path, kills, seed)
    assert differences(contents(where), expected) == []
