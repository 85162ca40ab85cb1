"""`kill -9` between reserve and verify: nothing done twice, nothing left in force past its expiry, nothing stranded."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flyball.app.store import acts, ledger, operations
from flyball.app.store.sqlite import open_reader
from flyball.core.directives import OperationReport
from flyball.lab.estate import default_estate
from flyball.lab.faults import GpuXid, ProviderOutage
from flyball.lab.sim import START_AT, Simulator
from tests.app.crash_actions_child import NODE, pipeline
from tests.app.crash_child import Step
from tests.processes import answers, eventually, free_port, stop

ROOT = Path(__file__).parents[2]
LENGTH_S = 480


def script() -> list[Step]:
    """An outage and a broken GPU in lab traffic, then quiet for long enough that everything ends.

    A pipeline beside it says what the traffic's gateways obey; its hook does everything at once.
    """
    simulator = Simulator(default_estate(rate=4.0), seed=7)
    governor = pipeline()
    simulator.add_fault(ProviderOutage("a", 0.9, START_AT + 60, START_AT + 170))
    simulator.add_fault(GpuXid("node-1/gpu-3", 79, START_AT + 80, START_AT + 200))
    steps = []
    for second in range(1, LENGTH_S + 1):
        now = START_AT + second
        asked = []
        for batch in simulator.step(now):
            steps.append(Step.of(batch.received_at or now, batch.sender, list(batch.events)))
            asked += governor.feed(batch).operations
        steps.append(Step(now))
        asked += governor.tick(now).operations
        for o in asked:
            governor.take(
                OperationReport(
                    id=o.id, verb=o.verb, at=now, status="accepted" if o.dry_run else "succeeded", attempt=o.attempt,
                    dry_run=o.dry_run, targets=o.targets, predicted={"nodes": 1} if o.dry_run else {},
                )
            )  # fmt: skip
        simulator.set_directives(governor.directives())
    return steps


@dataclass(frozen=True)
class Played:
    """What one way through the script left."""

    ledger: list[dict[str, Any]]
    broken: int | None
    live: list[str]
    open: list[dict[str, Any]]
    done: list[tuple[str, str]]
    """What the hook did: operation and what."""
    asked: list[tuple[str, ...]]
    """What it was asked: operation, verb, attempt, whether as a dry run."""
    node: str

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line["body"] for line in self.ledger if line["kind"] == kind]

    def outcomes(self) -> list[tuple[str, str]]:
        return [(o["runbook"], o["result"]) for o in self.of("outcome")]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def played(folder: Path) -> Played:
    done, asked = (lines(folder / "hook" / name) for name in ("done.log", "asked.log"))
    engine = open_reader(folder / "db")
    with engine.connect() as c:
        found = Played(
            ledger=ledger.list_ledger(c, limit=100_000),
            broken=ledger.verify_ledger(c),
            live=[d.id for d in acts.live_directives(c)],
            open=operations.unfinished(c),
            done=[(line.split()[0], line.split()[1]) for line in done],
            asked=[tuple(line.split()) for line in asked],
            node=(folder / "hook" / "nodes" / NODE).read_text(),
        )
    engine.dispose()
    return found


@contextmanager
def hook(folder: Path) -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.app.crash_actions_child", "hook", str(port), str(folder / "hook")], cwd=ROOT
    )  # fmt: skip
    try:
        assert eventually(lambda: answers(port), 60, 0.02), "the hook does not answer"
        yield f"http://127.0.0.1:{port}/"
    finally:
        stop(process)


@dataclass(frozen=True)
class Kill:
    """Where a life ends: at the first step that is not before `at_s`, or when it has sent the hook this many `requests` and waits for
    the answer to the last; and so much later by the clock on the wall. `down_s` of the script pass before the next life begins."""

    at_s: float = 0.0
    requests: int = 0
    later_s: float = 0.0
    down_s: int = 0


def lives(folder: Path, script: Path, steps: list[Step], kills: list[Kill], seed: int) -> Played:
    """Plays the script, killed at these points; the last life plays it to its end."""
    chance = random.Random(seed)
    left_out = 0
    with hook(folder) as url:
        for kill in [*kills, None]:
            every_s = str(chance.choice((0.5, 20.0, 1e9)))
            said, errors = folder / "said", folder / "errors"
            with said.open("w") as out, errors.open("w") as err:
                child = subprocess.Popen(
                    [sys.executable, "-m", "tests.app.crash_actions_child", "govern",
                     str(folder / "db"), str(script), every_s, url, str(left_out)],
                    cwd=ROOT, stdout=out, stderr=err,
                )  # fmt: skip
            if kill is not None:
                before = len(lines(folder / "hook" / "asked.log"))
                eventually(
                    lambda k=kill, c=child, n=before: c.poll() is not None or _is_due(k, folder, n),
                    240,
                    0.001,
                )
                try:
                    child.wait(kill.later_s)
                except subprocess.TimeoutExpired:
                    child.send_signal(signal.SIGKILL)
                at = _time(said)
                left_out += sum(at < step.at <= at + kill.down_s for step in steps)
            assert child.wait(240) in (0, -signal.SIGKILL), errors.read_text()[-3000:]
    return played(folder)


def _is_due(kill: Kill, folder: Path, asked_before: int) -> bool:
    if kill.requests:
        return len(lines(folder / "hook" / "asked.log")) >= asked_before + kill.requests
    return _time(folder / "said") >= START_AT + kill.at_s


def _time(said: Path) -> float:
    """The script's time when the last whole line was said."""
    whole = said.read_text().rpartition("\n")[0]
    return float(whole.rpartition("\n")[2].split()[1]) if whole else 0.0


def check(found: Played) -> None:
    """What holds wherever it was killed."""
    # Nothing executed twice, at the receiver and in the ledger; no attempt at a start is even sent twice.
    starts = Counter(a for a in found.asked if a[1] == "start" and a[3] == "False")
    assert all(n == 1 for n in starts.values()), found.asked
    assert all(n == 1 for n in Counter(found.done).values()), found.done
    granted = Counter(d["directive"]["id"] for d in found.of("directive") if d["change"] == "granted")
    assert all(n == 1 for n in granted.values()), granted
    # Nothing in force: every lease ended, and what the hook did is undone.
    ended = {d["directive"]["id"] for d in found.of("directive") if d["change"] in ("released", "expired")}
    assert (set(granted) - ended, found.live) == (set(), [])
    assert found.node == "ready", (found.done, found.outcomes())
    # Nothing stranded: every plan that ran came to its end, and every request to the hook as well.
    ran = {d["plan_hash"] for d in found.of("decision") if d["decision"] == "run"}
    over = Counter(o["values"]["plan"] for o in found.of("outcome") if o["values"].get("plan_ended"))
    assert set(over) == ran
    assert set(over.values()) <= {1}
    assert found.open == []
    assert found.broken is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Step], Path, Played]:
    """The script, as a list and as a file, and what is left when nobody is killed."""
    folder = tmp_path_factory.mktemp("whole")
    steps = script()
    path = folder / "script"
    path.write_bytes(msgspec.msgpack.encode(steps))
    return steps, path, lives(folder, path, steps, [], 0)


def some_kills(found: Played, n: int, seed: int) -> list[Kill]:
    """Half of them while a request to the hook is under way, the others where a lease or an outcome changes, or anywhere between the
    first reservation and the last verification."""
    chance = random.Random(seed)
    changed = [line["at"] - START_AT for line in found.ledger if line["kind"] in ("directive", "outcome")]
    points = [chance.choice((chance.choice(changed), chance.uniform(75, 200))) for _ in range(n - n // 2)]
    kills = [Kill(at_s=at, later_s=chance.uniform(0, 0.2)) for at in sorted(points)]
    for _ in range(n // 2):
        under_way = Kill(requests=chance.choice((1, 2, 2, 3)), later_s=chance.uniform(0, 0.05))
        kills.insert(chance.randrange(len(kills) + 1), under_way)
    return kills


def test_uninterrupted_both_are_verified_let_go_and_undone(whole: tuple[list[Step], Path, Played]) -> None:
    """Otherwise the tests below would kill nothing that matters."""
    _, _, found = whole
    check(found)
    assert {("provider-failover", "verified"), ("gpu-drain", "verified")} <= set(found.outcomes())
    assert [what for _, what in found.done] == ["drain", "undo"]


def test_five_kills_at_random_points_between_reserve_and_verify(
    whole: tuple[list[Step], Path, Played], tmp_path: Path
) -> None:
    steps, path, uninterrupted = whole
    check(lives(tmp_path, path, steps, some_kills(uninterrupted, 5, 5), 5))


def test_what_ran_out_while_flyball_was_dead_is_not_in_force_when_it_is_back(
    whole: tuple[list[Step], Path, Played], tmp_path: Path
) -> None:
    """Killed with the lease granted and the operation done; back five minutes of the script later."""
    steps, path, _ = whole
    check(lives(tmp_path, path, steps, [Kill(at_s=110.0, down_s=300)], 1))


def test_kills_while_the_hook_is_asked(whole: tuple[list[Step], Path, Played], tmp_path: Path) -> None:
    """First during the dry run, which is made again; then during the start, which is not sent again: the hook is asked what came of it."""
    steps, path, _ = whole
    found = lives(tmp_path, path, steps, [Kill(requests=1), Kill(requests=2)], 2)
    check(found)
    assert [what for _, what in found.done] == ["drain", "undo"]
    sent = [(verb, attempt, dry) for _, verb, attempt, dry in found.asked]
    assert sent == [
        ("start", "1", "True"), ("start", "2", "True"), ("start", "1", "False"), ("undo", "1", "False"),
    ]  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_kills_at_random_points(
    whole: tuple[list[Step], Path, Played], tmp_path: Path, seed: int
) -> None:
    steps, path, uninterrupted = whole
    kills = some_kills(uninterrupted, 10, 100 + seed)
    if seed % 4 == 3:
        kills = [replace(k, down_s=7 * (n % 3)) for n, k in enumerate(kills)]
    check(lives(tmp_path, path, steps, kills, seed))
