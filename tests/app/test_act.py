"""What people decide, over HTTP, on a real runtime: approvals, the kill switch, letting go, explaining, the ledger."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flyball.app.embedded import Embedded
from flyball.app.pipeline import Pipeline
from flyball.app.store import ledger, store
from flyball.app.wiring import make_pipeline
from flyball.core.directives import Approval, StopChange
from flyball.core.estate import Emissions
from flyball.core.events import Batch, Change
from tests.app._http import TOKENS, bearer, served
from tests.app._runtime import NOW, SetClock, calls, incident, outage, started, take, well
from tests.app._runtime import make_pipeline as acting
from tests.app.crash_child import settings


def asking() -> Pipeline:
    """As shipped: plans are suggested, and a person starts them."""
    return make_pipeline(settings())


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[tuple[httpx.Client, Embedded, SetClock, dict[str, Any]]]:
    """A served Flyball in which one plan waits for an answer."""
    clock = SetClock()
    with served(tmp_path, clock, pipeline=asking) as (client, runtime):
        incident(runtime, clock)
        (plan,) = client.get("/v1/approvals").json()
        yield client, runtime, clock, plan


Waits = tuple[httpx.Client, Embedded, SetClock, dict[str, Any]]


def answer(client: httpx.Client, hash: str, approve: bool = True) -> httpx.Response:
    return client.post("/v1/approvals", json={"hash": hash, "approve": approve})


def lines(runtime: Embedded, kind: str) -> list[dict[str, Any]]:
    with runtime.reader.connect() as c:
        return [e["body"] for e in ledger.list_ledger(c, kind=kind)]


# --- approvals ------------------------------------------------------------------------------------------------------


def test_an_approved_plan_is_carried_out_and_the_ledger_says_who_approved_it(waiting: Waits) -> None:
    client, runtime, _, plan = waiting
    assert client.get("/v1/directives").json() == []
    said = answer(client, plan["hash"])
    assert (said.status_code, said.json()["accepted"]) == (200, True)
    (lease,) = client.get("/v1/directives").json()
    assert (lease["incident"], lease["runbook"]) == (plan["incident"], plan["runbook"])
    assert client.get("/v1/approvals").json() == []
    assert [(p["by"], p["kind"], p["subject"], p["accepted"]) for p in lines(runtime, "person")] == [
        ("local", "approve", plan["hash"], True)
    ]
    decisions = lines(runtime, "decision")
    assert (decisions[-1]["decision"], decisions[-1]["reason"], decisions[-1]["by"]) == (
        "run",
        "approved",
        "local",
    )
    found = client.get(f"/v1/incidents/{plan['incident']}").json()
    assert found["actions"][-1]["by"] == "local"
    assert not any(a["plan"] for a in found["actions"])


def test_an_approval_counts_once(waiting: Waits) -> None:
    client, runtime, _, plan = waiting
    assert answer(client, plan["hash"]).status_code == 200
    again = answer(client, plan["hash"])
    assert (again.status_code, again.json()["reason"]) == (409, "approval_used")
    assert "counts once" in again.json()["error"]
    assert len([d for d in lines(runtime, "directive") if d["change"] == "granted"]) == 1


def test_a_hash_that_nothing_waits_under_is_refused(waiting: Waits) -> None:
    client, _, _, _ = waiting
    said = answer(client, "PLAN-OTHER")
    assert (said.status_code, said.json()["reason"]) == (409, "approval_unknown")


def test_a_denied_plan_is_not_offered_again(waiting: Waits) -> None:
    client, runtime, clock, plan = waiting
    assert answer(client, plan["hash"], approve=False).json()["accepted"] is True
    for _ in range(30):
        clock.at += 1.0
        take(runtime, outage(clock.at))
        assert runtime.wait_for(runtime.tick().result(30))
    assert client.get("/v1/approvals").json() == []
    assert client.get("/v1/directives").json() == []


def test_an_answer_after_its_time_is_refused_and_what_waits_is_no_longer_listed(waiting: Waits) -> None:
    client, runtime, clock, plan = waiting
    clock.at = plan["until"] + 1.0
    assert client.get("/v1/approvals").json() == []
    said = answer(client, plan["hash"])
    assert (said.status_code, said.json()["reason"]) == (409, "approval_expired")
    assert lines(runtime, "directive") == []


def test_who_made_a_change_that_belongs_to_the_incident_cannot_approve_its_remedy(tmp_path: Path) -> None:
    clock = SetClock()
    given = {"tokens": [*TOKENS, {"name": "bob", "token": "bobs-token-0123456789", "roles": ["operate"]}]}
    with served(tmp_path, clock, given=given, pipeline=asking) as (client, runtime):
        change = Change(
            at=NOW + 15, kind="route", summary="router 1.2", labels={"provider": "a"}, actor="operate"
        )
        take(runtime, [change])
        incident(runtime, clock)
        (plan,) = client.get("/v1/approvals", headers=bearer("operate")).json()
        body = {"hash": plan["hash"], "approve": True}
        own = client.post("/v1/approvals", json=body, headers=bearer("operate"))
        assert (own.status_code, own.json()["reason"]) == (409, "own_change")
        other = client.post(
            "/v1/approvals", json=body, headers={"authorization": "Bearer bobs-token-0123456789"}
        )
        assert (other.status_code, other.json()["accepted"]) == (200, True)


def test_an_approval_survives_a_restart_and_a_plan_that_waits_does_too(tmp_path: Path) -> None:
    clock = SetClock()
    with started(tmp_path, clock, pipeline=asking) as runtime:
        incident(runtime, clock)
        (plan,) = runtime.figures.waiting
    with started(tmp_path, clock, pipeline=asking) as again:
        assert [w.hash for w in again.figures.waiting] == [plan.hash]
        order = Approval(waiting=plan.hash, approve=True, by="ann", at=clock.at)
        assert again.wait_for(again.order(order).result(30))
        assert [d.incident for d in again.board.read()[1]] == [plan.plan.incident]
    with started(tmp_path, clock, pipeline=asking) as third:
        assert len(third.board.read()[1]) == 1
        assert third.figures.waiting == []


# --- the kill switch ------------------------------------------------------------------------------------------------


class Held(Pipeline):
    """Holds the stages at every batch until it is opened."""

    gate: threading.Event

    def feed(self, batch: Batch) -> Emissions:
        assert self.gate.wait(60)
        return super().feed(batch)


def held(gate: threading.Event) -> Pipeline:
    made = Held(acting().config)
    made.gate = gate
    return made


def backlog(runtime: Embedded, clock: SetClock) -> None:
    """An outage that the stages have not read: they would grant a lease over it."""
    for second in range(40):
        clock.at = NOW + second
        runtime.ingest(well(clock.at) if second < 20 else outage(clock.at), "gateway", clock.at).result(30)
        runtime.tick().result(30)


def test_a_stop_acts_before_the_stages_have_read_what_came_before_it(tmp_path: Path) -> None:
    """The lease that the stages then grant over the backlog is in the ledger, and reaches nobody."""
    clock, gate = SetClock(), threading.Event()
    with served(tmp_path, clock, pipeline=lambda: held(gate)) as (client, runtime):
        backlog(runtime, clock)
        assert runtime.position == 0
        said = client.post("/v1/stops", json={"scope": "all", "reason": "drill"})
        assert [s["scope"] for s in said.json()["stopped"]] == ["all"]
        assert runtime.position == 0  # the answer did not wait for the stages
        assert client.get("/v1/status").json()["stopped"] == ["all"]
        gate.set()
        assert runtime.wait_for(runtime.appended)
        assert [d["change"] for d in lines(runtime, "directive")] == ["granted"]
        assert client.get("/v1/directives").json() == []


def test_without_a_stop_the_same_backlog_leads_to_a_lease(tmp_path: Path) -> None:
    """Otherwise the test above would show nothing."""
    clock, gate = SetClock(), threading.Event()
    with served(tmp_path, clock, pipeline=lambda: held(gate)) as (client, runtime):
        backlog(runtime, clock)
        gate.set()
        assert runtime.wait_for(runtime.appended)
        assert len(client.get("/v1/directives").json()) == 1


def test_a_stop_and_what_it_held_back_survive_a_restart(tmp_path: Path) -> None:
    clock, gate = SetClock(), threading.Event()
    with started(tmp_path, clock, pipeline=lambda: held(gate)) as runtime:
        backlog(runtime, clock)
        runtime.order(StopChange(change="stop", scope="all", by="ann", at=clock.at)).result(30)
        gate.set()
        assert runtime.wait_for(runtime.appended)
        assert runtime.board.read()[1] == []
        assert len(runtime.board.live()) == 1
    with started(tmp_path, clock, pipeline=acting) as again:
        assert list(again.switchboard.stops.live) == ["all"]
        assert list(again.pipeline.stops.live) == ["all"]
        assert len(again.board.live()) == 1
        assert again.board.read()[1] == []
        again.order(StopChange(change="resume", scope="all", by="ann", at=clock.at)).result(30)
        assert len(again.board.read()[1]) == 1


def test_under_a_stop_the_stages_grant_nothing_and_say_why(tmp_path: Path) -> None:
    clock = SetClock()
    with served(tmp_path, clock, pipeline=acting) as (client, runtime):
        client.post("/v1/stops", json={"scope": "runbook:provider-failover"})
        incident(runtime, clock)
        assert lines(runtime, "directive") == []
        assert {"stopped"} <= {d["reason"] for d in lines(runtime, "decision")}


def test_under_a_stop_a_lease_can_still_be_let_go(tmp_path: Path) -> None:
    clock = SetClock()
    with served(tmp_path, clock, pipeline=acting) as (client, runtime):
        incident(runtime, clock)
        (lease,) = client.get("/v1/directives").json()
        client.post("/v1/stops", json={"scope": "all"})
        assert [d["id"] for d in client.get("/v1/directives").json()] == [lease["id"]]
        said = client.post(f"/v1/directives/{lease['id']}/release")
        assert (said.status_code, said.json()["accepted"]) == (200, True)
        assert client.get("/v1/directives").json() == []
        assert lines(runtime, "directive")[-1]["change"] == "released"


def test_a_stop_may_let_go_of_what_it_forbids(tmp_path: Path) -> None:
    clock = SetClock()
    with served(tmp_path, clock, pipeline=acting) as (client, runtime):
        incident(runtime, clock)
        (lease,) = client.get("/v1/directives").json()
        said = client.post("/v1/stops", json={"scope": "runbook:provider-failover", "release": True})
        assert said.json()["released"] == [lease["id"]]
        assert runtime.wait_for(runtime.appended)
        assert client.get("/v1/directives").json() == []


def test_a_tenant_for_whom_flyball_is_stopped_is_exempt_at_once(tmp_path: Path) -> None:
    clock = SetClock()
    with served(tmp_path, clock, pipeline=acting) as (client, runtime):
        incident(runtime, clock)
        tag = client.get("/v1/directives").headers["etag"]
        client.post("/v1/stops", json={"scope": "tenant:t1"})
        after = client.get("/v1/directives", headers={"if-none-match": tag})
        assert [d["exempt"] for d in after.json()] == [[{"tenant": "t1"}]]
        client.post("/v1/stops", json={"scope": "tenant:t1", "change": "resume"})
        assert [d["exempt"] for d in client.get("/v1/directives").json()] == [[]]


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        pytest.param({"scope": "tenants:x"}, 422, "did you mean 'tenant'", id="misspelt"),
        pytest.param({"scope": "tenant:"}, 422, "names no tenant", id="no-name"),
        pytest.param({"scope": "all", "change": "resume"}, 409, "is not stopped", id="not-stopped"),
        pytest.param(
            {"scope": "all", "change": "reset"}, 422, "only a runbook has a breaker", id="reset-all"
        ),
        pytest.param({"scope": "all", "change": "pause"}, 422, "body.change", id="unknown-change"),
    ],
)
def test_a_wrong_stop_is_refused_with_what_would_be_right(
    tmp_path: Path, body: dict[str, Any], status: int, why: str
) -> None:
    with served(tmp_path) as (client, runtime):
        said = client.post("/v1/stops", json=body)
        assert said.status_code == status
        assert why in said.json()["error"]
        assert runtime.appended == 0


def test_letting_go_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with served(tmp_path) as (client, _):
        said = client.post("/v1/directives/DIR-NONE/release")
        assert (said.status_code, said.json()["reason"]) == (409, "nothing_in_force")


def test_while_flyball_is_behind_a_persons_word_is_taken_and_not_promised(tmp_path: Path) -> None:
    clock, gate = SetClock(), threading.Event()
    with served(tmp_path, clock, pipeline=lambda: held(gate)) as (client, runtime):
        runtime.ingest(calls(1), "s", NOW).result(30)
        said = answer(client, "PLAN-X")
        assert (said.status_code, said.json()["accepted"]) == (202, None)
        gate.set()
        assert runtime.wait_for(runtime.appended)
        assert [p["reason"] for p in lines(runtime, "person")] == ["approval_unknown"]


# --- looking --------------------------------------------------------------------------------------------------------


def test_explain_says_every_guard_with_its_value(waiting: Waits) -> None:
    client, _, _, plan = waiting
    found = {e["runbook"]: e for e in client.get(f"/v1/incidents/{plan['incident']}/explain").json()}
    failover = found["provider-failover"]
    assert failover["verdict"] == "suggest"
    guards = {g["name"]: g for g in failover["guards"]}
    assert guards["when"]["ok"]
    assert [name for name, g in guards.items() if not g["ok"]] == ["mode"]
    assert {"blast", "cooldown", "lock"} <= set(guards)
    assert client.get("/v1/incidents/INC-NONE/explain").status_code == 404


def test_explain_is_asked_between_records_and_changes_nothing(waiting: Waits) -> None:
    client, runtime, _, plan = waiting
    before = runtime.ask(lambda p: p.snapshot()).result(30)
    client.get(f"/v1/incidents/{plan['incident']}/explain")
    assert runtime.ask(lambda p: p.snapshot()).result(30) == before


def test_the_ledger_is_read_in_pages_and_line_by_line(waiting: Waits) -> None:
    client, _, _, plan = waiting
    answer(client, plan["hash"])
    every = client.get("/v1/ledger").json()
    assert [e["seq"] for e in every] == list(range(1, len(every) + 1))
    assert client.get("/v1/ledger", params={"after": every[0]["seq"], "limit": 1}).json() == every[1:2]
    assert client.get("/v1/ledger", params={"newest": True, "limit": 1}).json() == every[-1:]
    (person,) = client.get("/v1/ledger", params={"kind": "person"}).json()
    one = client.get(f"/v1/ledger/{person['key']}").json()
    assert one["body"] == person["body"]
    assert client.get(f"/v1/ledger/{person['seq']}").json() == one
    assert client.get("/v1/ledger/PER-NONE").status_code == 404
    assert client.get("/v1/ledger", params={"kind": "anything"}).status_code == 422


def test_runbooks_are_listed_with_the_mode_that_is_in_force(waiting: Waits) -> None:
    client, _, _, _ = waiting
    found = client.get("/v1/runbooks").json()
    assert found["refused"] == []
    (failover,) = [r for r in found["runbooks"] if r["name"] == "provider-failover"]
    assert (failover["mode"], failover["in_force"], failover["source"]) == ("suggest", "suggest", "packaged")
    assert client.get("/v1/runbooks/provider-failover").json()["text"].count("runbook: v1") == 1
    assert client.get("/v1/runbooks/none").status_code == 404


def test_a_removed_last_line_of_the_ledger_is_found(tmp_path: Path) -> None:
    import sqlite3

    clock = SetClock()
    with started(tmp_path, clock) as runtime:
        incident(runtime, clock)
    database = sqlite3.connect(tmp_path / "flyball.sqlite3")
    database.execute("delete from ledger where seq = (select max(seq) from ledger)")
    database.commit()
    database.close()
    from flyball.app.store.sqlite import open_reader

    engine = open_reader(tmp_path / "flyball.sqlite3")
    with engine.connect() as c:
        assert ledger.verify_ledger(c) is not None
    engine.dispose()


def dry() -> Pipeline:
    config = acting().config
    from dataclasses import replace

    return Pipeline(replace(config, dry_run=True))


def test_in_a_dry_run_everything_is_recorded_and_nothing_takes_effect(tmp_path: Path) -> None:
    clock = SetClock()
    with started(tmp_path, clock, pipeline=dry) as runtime:
        found = incident(runtime, clock)
        assert runtime.board.read()[1] == []
        assert lines(runtime, "directive") == []
        assert ("applied", "dry_run") in {(o["result"], o["reason"]) for o in lines(runtime, "outcome")}
        with runtime.reader.connect() as c:
            assert store.get_incident(c, found) is not None


def test_without_a_role_nobody_decides(tmp_path: Path) -> None:
    ways = [
        ("POST", "/v1/approvals", {"hash": "PLAN-1", "approve": True}, "operate"),
        ("POST", "/v1/stops", {"scope": "all"}, "operate"),
        ("POST", "/v1/directives/DIR-1/release", {}, "operate"),
        ("GET", "/v1/approvals", None, "operate"),
        ("GET", "/v1/stops", None, "read"),
        ("GET", "/v1/runbooks", None, "read"),
        ("GET", "/v1/ledger", None, "read"),
        ("GET", "/v1/incidents/INC-1/explain", None, "read"),
    ]
    with served(tmp_path, given={"tokens": TOKENS}) as (client, runtime):
        for method, path, body, role in ways:
            assert client.request(method, path, json=body).status_code == 401, path
            other = "ingest" if role != "ingest" else "read"
            assert client.request(method, path, json=body, headers=bearer(other)).status_code == 403, path
        assert runtime.appended == 0
