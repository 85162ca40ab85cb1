"""Remediation hooks on the runtime's database: asked once, stopped at once, known after a crash; and the hooks' own word."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from flyball.app.embedded import Embedded
from flyball.app.hooks import StoredOperations, wanted
from flyball.app.pipeline import Pipeline
from flyball.app.store import ledger, operations
from flyball.app.wiring import pipeline_config
from flyball.core.directives import StopChange
from flyball.remediation import actions
from flyball.remediation.hooks import Dispatcher, HookClient, HookSettings, OperationRow
from flyball.remediation.signing import signed_headers
from flyball.runbooks.loader import load_texts
from tests.app._http import served
from tests.app._runtime import SetClock, incident, outage, started, take
from tests.app.crash_child import settings

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
HOOK = HookSettings.model_validate({"name": "nodes", "url": "https://hook.example/", "secrets": [SECRET]})
RUNBOOK = """
runbook: v1
name: drain
owner: infra
description: Asks a hook about a provider that fails.
when: incident.root.kind == "provider" && incident.severity >= HIGH
mode: auto
limits: {blast: {traffic: 100%, tenants: 100}}
steps:
  - hook: {name: nodes, action: drain, targets: $incident.root, for: 1h, dry_run: false}
    verify: {within: 3m, expect: 'errors("from") < 0.02', against: nothing}
"""


def pipeline() -> Pipeline:
    runbooks = load_texts({"drain.yaml": RUNBOOK}, actions=actions.registry())
    return Pipeline(pipeline_config(settings(), runbooks=runbooks))


class Hook(httpx.AsyncBaseTransport):
    """A hook that keeps what it is asked and answers with one status; `lost` drops the connection after the request."""

    def __init__(self, status: str = "accepted", lost: bool = False) -> None:
        self.asked: list[dict[str, Any]] = []
        self.status, self.lost = status, lost

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            self.asked.append(json.loads(await request.aread()))
            if self.lost:
                raise httpx.ReadError("gone")
        return httpx.Response(200, content=_streamed(json.dumps({"status": self.status}).encode()))


async def _streamed(body: bytes) -> AsyncIterator[bytes]:
    yield body


def drain(runtime: Embedded, hook: Hook, may: Callable[[Any], bool] | None = None) -> None:
    """One round of the dispatcher over what is due now."""

    async def work() -> None:
        async with httpx.AsyncClient(transport=hook) as client:
            dispatcher = Dispatcher(
                StoredOperations(runtime), HookClient([HOOK], client, runtime.clock),
                may or partial(wanted, runtime), clock=runtime.clock, rng=random.Random(1),
            )  # fmt: skip
            await dispatcher.drain()

    asyncio.run(work())
    assert runtime.wait_for(runtime.appended)


def rows(runtime: Embedded) -> list[OperationRow]:
    with runtime.reader.connect() as c:
        return operations.due_operations(c, 1e12, 100)


def results(runtime: Embedded) -> list[tuple[str, str]]:
    with runtime.reader.connect() as c:
        return [(e["body"]["result"], e["body"]["reason"]) for e in ledger.list_ledger(c, kind="outcome")]


def test_an_operation_is_reserved_in_the_ledger_before_the_hook_hears_of_it_and_asked_once(
    tmp_path: Path,
) -> None:
    clock, hook = SetClock(), Hook()
    with started(tmp_path, clock, pipeline=pipeline) as runtime:
        found = incident(runtime, clock)
        (row,) = rows(runtime)
        assert (row.state, row.operation.verb, row.operation.incident) == ("reserved", "start", found)
        with runtime.reader.connect() as c:
            (entry,) = ledger.list_ledger(c, kind="operation")
        assert entry["body"]["id"] == row.operation.id
        drain(runtime, hook)
        drain(runtime, hook)
        (asked,) = hook.asked
        assert (asked["operation_id"], asked["action"], asked["targets"]) == (
            row.operation.id, "drain", ["provider:a"],
        )  # fmt: skip
        assert [r.state for r in rows(runtime)] == ["asking"]


def test_under_a_stop_a_start_is_not_sent_though_the_stages_have_not_heard_of_it(tmp_path: Path) -> None:
    clock, hook = SetClock(), Hook()
    with started(tmp_path, clock, pipeline=pipeline) as runtime:
        incident(runtime, clock)
        (row,) = rows(runtime)
        assert wanted(runtime, row.operation)
        stop = StopChange(change="stop", scope="action:hook", by="ann", at=clock.at)
        runtime.order(stop).result(30)
        # Only the switchboard is asked here: what the stages think is put aside.
        assert runtime.switchboard.stop_of(row.operation) == stop
        assert not wanted(runtime, row.operation)
        drain(runtime, hook)
        assert hook.asked == []
        assert [r for r in rows(runtime) if r.operation.verb == "start"] == []


def test_what_was_sent_when_the_process_ended_is_asked_about_and_never_sent_again(tmp_path: Path) -> None:
    clock, hook = SetClock(), Hook("succeeded")
    with started(tmp_path, clock, pipeline=pipeline) as runtime:
        incident(runtime, clock)
        (row,) = rows(runtime)
        # The process ends between the mark and the answer.
        runtime.write(lambda c: operations.mark_sending(c, row.operation, clock.at)).result(30)
    with started(tmp_path, clock, pipeline=pipeline) as again:
        assert [r.state for r in rows(again)] == ["sending"]
        drain(again, hook)
        assert hook.asked == []
        assert rows(again) == []
        assert "applied" in {result for result, _ in results(again)}


def test_a_lost_answer_is_never_sent_again(tmp_path: Path) -> None:
    clock, hook = SetClock(), Hook("ambiguous", lost=True)
    with started(tmp_path, clock, pipeline=pipeline) as runtime:
        incident(runtime, clock)
        for _ in range(60):
            drain(runtime, hook)
            clock.at += 1.0
            take(runtime, outage(clock.at))
            assert runtime.wait_for(runtime.tick().result(30))
        assert len([a for a in hook.asked if a["verb"] == "start"]) == 1
        assert "ambiguous" in {result for result, _ in results(runtime)}


def test_an_operation_survives_a_restart_and_is_sent_by_the_next_life(tmp_path: Path) -> None:
    clock, hook = SetClock(), Hook()
    with started(tmp_path, clock, pipeline=pipeline) as runtime:
        incident(runtime, clock)
    with started(tmp_path, clock, pipeline=pipeline) as again:
        drain(again, hook)
        assert len(hook.asked) == 1


def test_a_mark_is_set_once_and_only_for_the_attempt_that_is_held(tmp_path: Path) -> None:
    clock = SetClock()
    with started(tmp_path, clock, pipeline=pipeline) as runtime:
        incident(runtime, clock)
        (row,) = rows(runtime)
        store = StoredOperations(runtime)

        async def work() -> list[bool]:
            import msgspec

            later = msgspec.structs.replace(row.operation, attempt=2)
            return [
                await store.mark_sending(later, clock.at),
                await store.mark_sending(row.operation, clock.at),
                await store.mark_sending(row.operation, clock.at),
            ]

        assert asyncio.run(work()) == [False, True, False]


# --- callbacks ------------------------------------------------------------------------------------------------------

GIVEN = {"hooks": [{"name": "nodes", "url": "https://hook.example/", "secrets": [SECRET]}]}


def told(operation: str, **fields: Any) -> tuple[str, dict[str, str]]:
    """A callback with its headers. Signed by this machine's clock: the verifier of Standard Webhooks reads no other."""
    import time

    body = json.dumps({"operation_id": operation, "verb": "start", "status": "succeeded"} | fields)
    return body, signed_headers(HOOK.secrets, f"cb-{operation}", body, time.time())


def test_a_signed_callback_is_the_hooks_word_and_ends_the_asking(tmp_path: Path) -> None:
    clock, hook = SetClock(), Hook()
    with served(tmp_path, clock, given=GIVEN, pipeline=pipeline) as (client, runtime):
        incident(runtime, clock)
        (row,) = rows(runtime)
        drain(runtime, hook)
        body, headers = told(row.operation.id, undo_ref="U-1")
        said = client.post(f"/v1/operations/{row.operation.id}", content=body, headers=headers)
        assert said.status_code == 202
        assert runtime.wait_for(runtime.appended)
        assert rows(runtime) == []
        assert "applied" in {result for result, _ in results(runtime)}


def test_a_callback_that_the_hook_did_not_sign_is_refused_like_one_about_nothing(tmp_path: Path) -> None:
    clock = SetClock()
    with served(tmp_path, clock, given=GIVEN, pipeline=pipeline) as (client, runtime):
        incident(runtime, clock)
        (row,) = rows(runtime)
        position, path = runtime.appended, f"/v1/operations/{row.operation.id}"
        body, headers = told(row.operation.id)
        other, other_headers = told("OPR-OTHER")
        assert client.post(path, content=body).status_code == 401
        assert (
            client.post(path, content=body.replace("succeeded", "failed"), headers=headers).status_code == 401
        )
        assert (
            client.post("/v1/operations/OPR-OTHER", content=other, headers=other_headers).status_code == 401
        )
        assert client.post(path, content=other, headers=other_headers).status_code == 422
        assert runtime.appended == position
